//! Connections to a daemon on another machine.

use crate::endpoint::TcpEndpoint;
use crate::error::ClientError;
use crate::exit;
use std::error::Error;
use std::path::Path;
use std::time::Duration;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// A connection that nothing is said on is tested this often, so that a watcher notices a peer that is gone.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Connects; the inner error says why nobody answers.
///
/// # Errors
/// A file that cannot be read, an address that is none.
pub(crate) async fn connect(tcp: &TcpEndpoint, limit: Duration) -> Result<Result<Channel, String>, ClientError> {
    let mut tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(read("CA certificate", &tcp.ca)?))
        .identity(Identity::from_pem(read("certificate", &tcp.certificate)?, read("key", &tcp.key)?));
    if let Some(name) = &tcp.server_name {
        tls = tls.domain_name(name);
    }
    let wrong = |e: &dyn Error| ClientError::Usage(format!("cannot connect to {}: {}", tcp.address, chain(e)));
    let endpoint = Endpoint::from_shared(format!("https://{}", tcp.address)).map_err(|e| wrong(&e))?;
    let endpoint = endpoint.tls_config(tls).map_err(|e| wrong(&e))?;
    let endpoint = endpoint.http2_keep_alive_interval(KEEPALIVE).tcp_nodelay(true);
    Ok(match tokio::time::timeout(limit, endpoint.connect()).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(e)) => Err(chain(&e)),
        Err(_) => Err(format!("did not accept a connection within {} s", limit.as_secs())),
    })
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, ClientError> {
    std::fs::read(path).map_err(|source| ClientError::Read { what, path: path.into(), source, exit_code: exit::USAGE })
}

/// An error and what caused it, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = inner.source();
    }
    text
}
