//! Certificates for TLS to the server, read anew for each attempt to connect,
//! so that a renewed file is taken up. Files that hold nothing usable are
//! refused here, by name: the TLS library would just trust nobody.

use std::path::Path;

use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};

use super::{TlsConfig, error::unsupported};
use crate::error::Result;

/// Reads and checks the files. Blocks on the file system.
pub(super) fn load(config: Option<&TlsConfig>) -> Result<OwnedTLSConfig> {
    let Some(config) = config else {
        return Ok(OwnedTLSConfig::default());
    };
    let cert_chain = match &config.ca_file {
        None => None,
        Some(path) => {
            let pem = read(path, "ca_file")?;
            check_certificates(&pem, path, "ca_file")?;
            Some(String::from_utf8(pem).map_err(|_| {
                unsupported(format!(
                    "rabbitmq.tls.ca_file {}: it is not a PEM file",
                    path.display()
                ))
            })?)
        }
    };
    let identity = match (&config.cert_file, &config.key_file) {
        (None, None) => None,
        (Some(cert), Some(key)) => {
            let pem = read(cert, "cert_file")?;
            check_certificates(&pem, cert, "cert_file")?;
            let key_pem = read(key, "key_file")?;
            if !matches!(
                rustls_pemfile::private_key(&mut key_pem.as_slice()),
                Ok(Some(_))
            ) {
                return Err(unsupported(format!(
                    "rabbitmq.tls.key_file {}: no unencrypted private key in PEM form in it",
                    key.display()
                )));
            }
            Some(OwnedIdentity::PKCS8 { pem, key: key_pem })
        }
        _ => {
            return Err(unsupported(
                "rabbitmq.tls: cert_file and key_file go together; one of them is missing",
            ));
        }
    };
    Ok(OwnedTLSConfig {
        identity,
        cert_chain,
    })
}

fn read(path: &Path, setting: &str) -> Result<Vec<u8>> {
    std::fs::read(path)
        .map_err(|e| unsupported(format!("rabbitmq.tls.{setting} {}: {e}", path.display())))
}

fn check_certificates(pem: &[u8], path: &Path, setting: &str) -> Result<()> {
    let found = rustls_pemfile::certs(&mut &*pem)
        .filter(std::result::Result::is_ok)
        .count();
    if found == 0 {
        return Err(unsupported(format!(
            "rabbitmq.tls.{setting} {}: no certificate in PEM form in it",
            path.display()
        )));
    }
    Ok(())
}
