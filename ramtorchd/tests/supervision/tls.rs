//! TCP: certificates of every kind, made here.

use crate::bench::{Bench, refused, wait_for};
use crate::fake::Script;
use crate::trial;
use libtest_mimic::Trial;
use ramtorch_client::{Client, ClientError, Endpoint, TcpEndpoint, exit, v1};
use ramtorchd::access::config::{TcpConfig, UserRef};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SerialNumber, date_time_ymd,
};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Users of the certificates.
const ALICE: u32 = 4001;
const CAROL: u32 = 4003;

/// One who issues certificates.
struct Authority(Issuer<'static, KeyPair>);

impl Authority {
    fn new(dir: &Path, name: &str) -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(dir.join(format!("{name}.pem")), certificate.pem()).unwrap();
        Authority(Issuer::new(params, key))
    }

    /// Writes `NAME.pem` and `NAME.key`.
    fn issue(&self, dir: &Path, name: &str, names: &[&str], change: impl FnOnce(&mut CertificateParams)) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(names.iter().map(|n| n.to_string()).collect::<Vec<_>>()).unwrap();
        change(&mut params);
        let certificate = params.signed_by(&key, &self.0).unwrap();
        std::fs::write(dir.join(format!("{name}.pem")), certificate.pem()).unwrap();
        std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    fn revoke(&self, path: &Path, number: u64, serials: &[u64]) {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(2999, 1, 1),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        std::fs::write(path, list.signed_by(&self.0).unwrap().pem().unwrap()).unwrap();
    }
}

/// A daemon with certificates of all kinds beside it.
struct Place {
    bench: Bench,
    local: Client,
    authority: Authority,
    dir: PathBuf,
}

impl Place {
    async fn new(script: Script, change: impl FnOnce(&mut TcpConfig)) -> Place {
        let mut bench = Bench::new(1, script);
        let dir = bench.dir.path().to_path_buf();
        let authority = Authority::new(&dir, "ca");
        let stranger = Authority::new(&dir, "other-ca");
        authority.issue(&dir, "server", &["localhost"], |_| {});
        authority.issue(&dir, "alice", &["alice.example"], |p| p.serial_number = Some(SerialNumber::from(1001)));
        authority.issue(&dir, "carol", &["unlisted.example", "Carol.Example"], |_| {});
        authority.issue(&dir, "eve", &["eve.example"], |_| {});
        authority.issue(&dir, "mallory", &["mallory.example"], |_| {});
        authority.issue(&dir, "both", &["alice.example", "carol.example"], |_| {});
        authority.issue(&dir, "nameless", &[], |_| {});
        authority.issue(&dir, "expired", &["alice.example"], |p| {
            (p.not_before, p.not_after) = (date_time_ymd(2001, 1, 1), date_time_ymd(2002, 1, 1));
        });
        stranger.issue(&dir, "forged", &["alice.example"], |_| {});
        stranger.issue(&dir, "other-server", &["localhost"], |_| {});
        let file = |name: &str| dir.join(name);
        let mut config = TcpConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            certificate: file("server.pem"),
            key: file("server.key"),
            client_ca: file("ca.pem"),
            crl: None,
            clients: [("alice.example", ALICE), ("carol.example", CAROL), ("mallory.example", 4004)]
                .map(|(n, u)| (n.to_string(), UserRef::Uid(u)))
                .into(),
            revoked: vec!["mallory.example".into()],
            reflection: false,
        };
        change(&mut config);
        bench.settings.service.tcp = Some(config);
        bench.settings.service.access.users = vec![UserRef::Uid(ALICE), UserRef::Uid(CAROL), UserRef::Uid(4004)];
        let local = bench.up().await;
        Place { bench, local, authority, dir }
    }

    fn endpoint(&self, who: &str) -> TcpEndpoint {
        let file = |name: String| self.dir.join(name);
        TcpEndpoint {
            address: format!("localhost:{}", self.bench.tcp.unwrap().port()),
            ca: file("ca.pem".into()),
            certificate: file(format!("{who}.pem")),
            key: file(format!("{who}.key")),
            server_name: None,
        }
    }

    /// Connects and asks something: with TLS 1.3 a refusal may come with the first call only.
    async fn call(&self, who: &str) -> Result<Client, ClientError> {
        self.call_at(self.endpoint(who)).await
    }

    async fn call_at(&self, endpoint: TcpEndpoint) -> Result<Client, ClientError> {
        let mut client = Client::connect(Endpoint::Tcp(endpoint)).await?;
        client.info().await?;
        Ok(client)
    }
}

pub fn trials() -> Vec<Trial> {
    vec![
        trial("tcp_with_the_right_certificate_is_as_good_as_the_socket", || async {
            let mut p = Place::new(Script::endless(), |_| {}).await;
            let mut alice = p.call("alice").await.unwrap();
            let mut carol = p.call("carol").await.unwrap();
            let job = alice.submit(p.bench.job("one", 100_000, "")).await.unwrap();
            assert_eq!(job.uid, ALICE);
            wait_for(&mut alice, &job.id, "a step", |j| j.step > 1).await;
            let mut events = alice.watch(&job.id, 0).await.unwrap();
            assert!(events.next().await.unwrap().is_some());
            let (_, text) = refused(carol.cancel(&job.id).await);
            assert!(text.contains("only that user"), "{text}");
            assert!(refused(carol.shutdown().await).1.contains("administrator"));
            assert_eq!(p.local.get(&job.id).await.unwrap().uid, ALICE);
            alice.cancel(&job.id).await.unwrap();
            p.bench.end().await;
        }),
        trial("tcp_without_the_right_certificate_is_nothing", || async {
            let p = Place::new(Script::quick(), |_| {}).await;
            // The handshake fails: nothing is said about why, and nothing is served.
            for who in ["forged", "expired"] {
                let (code, text) = refused(p.call(who).await);
                assert_eq!(code, exit::UNREACHABLE, "{who}: {text}");
            }
            // The certificate is genuine, its name stands for nobody.
            for (who, words) in [
                ("eve", "eve.example is not among"),
                ("mallory", "mallory.example is revoked"),
                ("both", "several users"),
                ("nameless", "no DNS or URI name"),
            ] {
                let (_, text) = refused(p.call(who).await);
                assert!(text.contains(words), "{who}: {text}");
            }
            // No certificate at all, and no TLS at all.
            let url = format!("https://localhost:{}", p.bench.tcp.unwrap().port());
            let tls = tonic::transport::ClientTlsConfig::new()
                .ca_certificate(tonic::transport::Certificate::from_pem(std::fs::read(p.dir.join("ca.pem")).unwrap()));
            let bare = tonic::transport::Endpoint::from_shared(url.clone()).unwrap().tls_config(tls).unwrap().connect().await;
            if let Ok(channel) = bare {
                let mut node = v1::node_client::NodeClient::new(channel);
                assert!(node.info(v1::NodeInfoRequest {}).await.is_err());
            }
            let plain = tonic::transport::Endpoint::from_shared(url.replace("https", "http")).unwrap().connect().await;
            if let Ok(channel) = plain {
                assert!(v1::node_client::NodeClient::new(channel).info(v1::NodeInfoRequest {}).await.is_err());
            }
            // A daemon that cannot prove who it is is not trusted with anything either.
            let other = TcpEndpoint { ca: p.dir.join("other-ca.pem"), ..p.endpoint("alice") };
            let (code, text) = refused(p.call_at(other).await);
            assert!(code == exit::UNREACHABLE && text.to_lowercase().contains("certificate"), "{text}");
            let (_, text) = refused(p.call_at(TcpEndpoint { server_name: Some("else.example".into()), ..p.endpoint("alice") }).await);
            assert!(text.contains("else.example"), "{text}");
            assert!(p.call("alice").await.is_ok());
            p.bench.end().await;
        }),
        trial("a_certificate_is_revoked_while_the_daemon_runs", || async {
            let mut crl = PathBuf::new();
            let p = Place::new(Script::quick(), |c| {
                crl = c.client_ca.with_file_name("ca.crl");
                // Made before the daemon starts; that of nobody.
                std::fs::copy(&c.client_ca, &crl).unwrap();
                c.crl = None;
            })
            .await;
            let Place { mut bench, authority, dir, .. } = p;
            bench.down().await;
            authority.revoke(&crl, 1, &[7]);
            bench.settings.service.tcp.as_mut().unwrap().crl = Some(crl.clone());
            let local = bench.up().await;
            let p = Place { bench, local, authority, dir };
            assert!(p.call("alice").await.is_ok());
            // One that makes no sense changes nothing.
            std::fs::write(&crl, "nonsense").unwrap();
            tokio::time::sleep(Duration::from_millis(2100)).await;
            assert!(p.call("alice").await.is_ok());
            p.authority.revoke(&crl, 2, &[7, 1001]);
            tokio::time::sleep(Duration::from_millis(2100)).await;
            assert_eq!(refused(p.call("alice").await).0, exit::UNREACHABLE);
            assert!(p.call("carol").await.is_ok(), "who is not on the list comes in");
            p.bench.end().await;
        }),
        trial("reflection_is_off_on_tcp_unless_it_is_asked_for", || async {
            use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
            use tonic_reflection::pb::v1::{ServerReflectionRequest, server_reflection_request::MessageRequest};
            for on in [false, true] {
                let p = Place::new(Script::quick(), |c| c.reflection = on).await;
                let read = |name: &str| std::fs::read(p.dir.join(name)).unwrap();
                let tls = tonic::transport::ClientTlsConfig::new()
                    .ca_certificate(tonic::transport::Certificate::from_pem(read("ca.pem")))
                    .identity(tonic::transport::Identity::from_pem(read("alice.pem"), read("alice.key")));
                let url = format!("https://localhost:{}", p.bench.tcp.unwrap().port());
                let channel = tonic::transport::Endpoint::from_shared(url).unwrap().tls_config(tls).unwrap().connect().await.unwrap();
                let list = MessageRequest::ListServices(String::new());
                let request = ServerReflectionRequest { host: String::new(), message_request: Some(list) };
                let asked = ServerReflectionClient::new(channel.clone()).server_reflection_info(tokio_stream::iter([request])).await;
                match asked {
                    Ok(_) => assert!(on),
                    Err(status) => assert!(!on && status.code() == tonic::Code::Unimplemented, "{status}"),
                }
                let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
                let request = tonic_health::pb::HealthCheckRequest { service: "ramtorch.v1.Jobs".into() };
                assert_eq!(health.check(request).await.unwrap().into_inner().status, 1);
                p.bench.end().await;
            }
        }),
        trial("a_connection_over_tls_that_nobody_uses_gives_its_place_back", || async {
            let Place { mut bench, authority, dir, .. } = Place::new(Script::quick(), |_| {}).await;
            bench.down().await;
            (bench.settings.service.limits.connections, bench.settings.service.limits.connection_idle_seconds) = (1, 1.0);
            let local = bench.up().await;
            let p = Place { bench, local, authority, dir };
            let mut alice = p.call("alice").await.unwrap();
            // Hers is the only place; it is his once she has called nothing for a while, and then hers again.
            let end = std::time::Instant::now() + crate::bench::LIMIT;
            while let Err(why) = p.call("carol").await {
                assert!(std::time::Instant::now() < end, "{why}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            while let Err(why) = alice.info().await {
                assert!(std::time::Instant::now() < end, "{why}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            p.bench.end().await;
        }),
        trial("who_does_not_shake_hands_is_closed", || async {
            use tokio::io::AsyncReadExt;
            let p = Place::new(Script::quick(), |_| {}).await;
            let mut stream = tokio::net::TcpStream::connect(p.bench.tcp.unwrap()).await.unwrap();
            let mut said = Vec::new();
            let _ = tokio::time::timeout(crate::bench::LIMIT, stream.read_to_end(&mut said)).await.expect("the connection is closed");
            assert!(said.is_empty(), "{said:?}");
            p.bench.end().await;
        }),
        trial("certificates_that_make_no_sense_stop_the_start", || async {
            let p = Place::new(Script::quick(), |_| {}).await;
            let Place { mut bench, dir, .. } = p;
            bench.down().await;
            let good = bench.settings.service.tcp.clone().unwrap();
            for (key, config) in [
                ("certificate", TcpConfig { certificate: dir.join("none.pem"), ..good.clone() }),
                ("key", TcpConfig { key: dir.join("server.pem"), ..good.clone() }),
                ("client_ca", TcpConfig { client_ca: dir.join("server.key"), ..good.clone() }),
                ("crl", TcpConfig { crl: Some(dir.join("ca.pem")), ..good.clone() }),
                ("cannot be used", TcpConfig { key: dir.join("alice.key"), ..good.clone() }),
            ] {
                bench.settings.service.tcp = Some(config);
                let error = bench.try_up().await.unwrap_err();
                assert!(error.to_string().contains(key), "{key}: {error}");
                assert_eq!(error.exit_code(), exit::USAGE);
                assert!(!bench.settings.socket.exists());
            }
            bench.settings.service.tcp = Some(good);
            bench.up().await;
            bench.end().await;
        }),
    ]
}
