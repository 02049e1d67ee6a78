//! Mutual TLS: TLS 1.3 alone, a certificate of every client, its name looked up in `[tcp] clients`.
//!
//! Files are read again when they have changed, so that certificates are renewed and revocation lists replaced without a
//! restart; files that make no sense leave the old ones in force, and a warning. Sessions are never resumed: a
//! resumed one would be let in without a look at its certificate. A connection that is open when its certificate is
//! revoked or expires goes on until it ends.

use super::config::{TcpConfig, UserRef};
use nix::unistd::User;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use tokio_rustls::rustls::{RootCertStore, ServerConfig, crypto, version};

/// Files are looked at for changes this often, at most.
const LOOK: Duration = Duration::from_secs(2);

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file.
    #[error("[tcp] {key}: {}: {detail}", .path.display())]
    File {
        /// Key of the configuration.
        key: &'static str,
        /// Its value.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// All of them together.
    #[error("[tcp] the certificates cannot be used: {0}")]
    Together(String),
}

/// Who is at the other end of a TLS connection.
#[derive(Debug, Clone)]
pub struct Peer(Result<u32, String>);

impl Peer {
    /// The local user that the certificate stands for.
    ///
    /// # Errors
    /// Text: nobody.
    pub fn uid(&self) -> Result<u32, String> {
        self.0.clone()
    }
}

/// TLS of a daemon.
pub struct Tls {
    config: TcpConfig,
    state: Mutex<State>,
}

struct State {
    server: Arc<ServerConfig>,
    files: Vec<Stamp>,
    looked: Instant,
}

type Stamp = Option<(SystemTime, u64)>;

impl Tls {
    /// Reads certificates, key and revocation lists.
    ///
    /// # Errors
    /// One of them is missing or makes no sense.
    pub fn load(config: TcpConfig) -> Result<Tls, TlsError> {
        let files = stamps(&config);
        let server = build(&config)?;
        Ok(Tls { state: Mutex::new(State { server, files, looked: Instant::now() }), config })
    }

    /// For the next connection. Touches the file system.
    pub fn acceptor(&self) -> TlsAcceptor {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked.elapsed() >= LOOK {
            state.looked = Instant::now();
            let files = stamps(&self.config);
            if files != state.files {
                match build(&self.config) {
                    Ok(server) => {
                        tracing::info!("certificates of [tcp] were read again");
                        (state.server, state.files) = (server, files);
                    }
                    Err(e) => tracing::warn!("{e}; the old ones stay in force"),
                }
            }
        }
        TlsAcceptor::from(state.server.clone())
    }

    /// Whom a verified certificate stands for.
    pub fn peer(&self, certificates: Option<&[CertificateDer<'_>]>) -> Peer {
        Peer(self.user(certificates))
    }

    fn user(&self, certificates: Option<&[CertificateDer<'_>]>) -> Result<u32, String> {
        let first = certificates.and_then(|c| c.first()).ok_or("no certificate was shown")?;
        let certificate = webpki::EndEntityCert::try_from(first).map_err(|e| format!("the certificate makes no sense: {e}"))?;
        let names: Vec<&str> = certificate.valid_dns_names().chain(certificate.valid_uri_names()).collect();
        if let Some(name) = names.iter().find(|n| self.config.revoked.iter().any(|r| r.eq_ignore_ascii_case(n))) {
            return Err(format!("{name} is revoked ([tcp] revoked)"));
        }
        let listed = |name: &str| self.config.clients.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, user)| user);
        let mut users = names.iter().filter_map(|n| listed(n));
        match (users.next(), users.next()) {
            (Some(user), None) => uid_of(user),
            (Some(user), Some(other)) if user == other => uid_of(user),
            (Some(_), Some(_)) => Err(format!("the certificate's names ({}) stand for several users of [tcp] clients", names.join(", "))),
            (None, _) if names.is_empty() => Err("the certificate has no DNS or URI name (subjectAltName)".into()),
            (None, _) => Err(format!("{} is not among [tcp] clients", names.join(", "))),
        }
    }
}

fn uid_of(user: &UserRef) -> Result<u32, String> {
    match user {
        UserRef::Uid(uid) => Ok(*uid),
        UserRef::Name(name) => match User::from_name(name) {
            Ok(Some(user)) => Ok(user.uid.as_raw()),
            Ok(None) => Err(format!("[tcp] clients: there is no user {name} on this machine")),
            Err(e) => Err(format!("[tcp] clients: cannot look up the user {name}: {e}")),
        },
    }
}

fn stamps(c: &TcpConfig) -> Vec<Stamp> {
    let stamp = |p: &Path| std::fs::metadata(p).ok().and_then(|m| Some((m.modified().ok()?, m.len())));
    [Some(&c.certificate), Some(&c.key), Some(&c.client_ca), c.crl.as_ref()].into_iter().flatten().map(|p| stamp(p)).collect()
}

fn build(c: &TcpConfig) -> Result<Arc<ServerConfig>, TlsError> {
    let error = |key: &'static str, path: &Path, detail: String| TlsError::File { key, path: path.into(), detail };
    let together = |e: &dyn std::fmt::Display| TlsError::Together(e.to_string());
    let chain = |key: &'static str, path: &Path| -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let certificates = read.map_err(|e| error(key, path, e.to_string()))?;
        if certificates.is_empty() { Err(error(key, path, "holds no certificate".into())) } else { Ok(certificates) }
    };
    let mut roots = RootCertStore::empty();
    for certificate in chain("client_ca", &c.client_ca)? {
        roots.add(certificate).map_err(|e| error("client_ca", &c.client_ca, e.to_string()))?;
    }
    let provider = Arc::new(crypto::ring::default_provider());
    let mut verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    if let Some(path) = &c.crl {
        let read = CertificateRevocationListDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let lists = read.map_err(|e| error("crl", path, e.to_string()))?;
        if lists.is_empty() {
            return Err(error("crl", path, "holds no revocation list".into()));
        }
        verifier = verifier.with_crls(lists).only_check_end_entity_revocation();
    }
    let verifier = verifier.build().map_err(|e| together(&e))?;
    let key = PrivateKeyDer::from_pem_file(&c.key).map_err(|e| error("key", &c.key, e.to_string()))?;
    let builder = ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&version::TLS13]).map_err(|e| together(&e))?;
    let server = builder.with_client_cert_verifier(verifier).with_single_cert(chain("certificate", &c.certificate)?, key);
    let mut server = server.map_err(|e| together(&e))?;
    server.alpn_protocols = vec![b"h2".to_vec()];
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    Ok(Arc::new(server))
}
