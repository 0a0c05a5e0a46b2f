//! API signing keys as `~/.oci/config` describes them, and the certificate authority for TLS.

use super::encode::{base64, hex};
use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::KeyPair as _;
use md5::{Digest, Md5};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

/// A key the server trusts: the `keyId` of the signature and the public key in PEM.
#[derive(Clone, Debug)]
pub struct TrustedKey {
    /// `tenancy/user/fingerprint`.
    pub key_id: String,
    /// The SubjectPublicKeyInfo in PEM, as one uploads it in the console.
    pub public_key_pem: String,
}

/// A generated API signing key of a made-up user in a made-up tenancy.
#[derive(Clone, Debug)]
pub struct ApiKey {
    /// OCID of the tenancy.
    pub tenancy: String,
    /// OCID of the user.
    pub user: String,
    /// MD5 of the public key's DER form, in pairs of hex digits parted by colons.
    pub fingerprint: String,
    /// The private key in PKCS #8 PEM, unencrypted.
    pub private_key_pem: String,
    /// The public key in PEM.
    pub public_key_pem: String,
}

impl ApiKey {
    /// Generates a fresh RSA key of 2048 bits.
    pub fn generate() -> ApiKey {
        let pair = KeyPair::generate(KeySize::Rsa2048).unwrap();
        let private: Pkcs8V1Der = pair.as_der().unwrap();
        let public: PublicKeyX509Der = pair.public_key().as_der().unwrap();
        let digest = Md5::digest(public.as_ref());
        let fingerprint: Vec<String> = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let unique = hex(&digest[..8]);
        ApiKey {
            tenancy: format!("ocid1.tenancy.oc1..test{unique}"),
            user: format!("ocid1.user.oc1..test{unique}"),
            fingerprint: fingerprint.join(":"),
            private_key_pem: pem("PRIVATE KEY", private.as_ref()),
            public_key_pem: pem("PUBLIC KEY", public.as_ref()),
        }
    }

    /// `tenancy/user/fingerprint`, as the signature names the key.
    pub fn key_id(&self) -> String {
        format!("{}/{}/{}", self.tenancy, self.user, self.fingerprint)
    }

    /// What the server has to know of this key.
    pub fn trusted(&self) -> TrustedKey {
        TrustedKey { key_id: self.key_id(), public_key_pem: self.public_key_pem.clone() }
    }

    /// Writes `config` with the one profile, `key.pem` and `public.pem` into the directory, and
    /// answers the path of `config`.
    pub fn write_profile(&self, dir: &Path, profile: &str, region: &str) -> io::Result<PathBuf> {
        fs::create_dir_all(dir)?;
        let key_file = dir.join("key.pem");
        fs::write(&key_file, &self.private_key_pem)?;
        fs::write(dir.join("public.pem"), &self.public_key_pem)?;
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(&key_file, fs::Permissions::from_mode(0o600))?;
        }
        let config = dir.join("config");
        let text = format!(
            "[{profile}]\nuser={}\nfingerprint={}\ntenancy={}\nregion={region}\nkey_file={}\n",
            self.user,
            self.fingerprint,
            self.tenancy,
            key_file.display()
        );
        fs::write(&config, text)?;
        Ok(config)
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = base64(der);
    let lines: Vec<&str> =
        text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// The bytes between the BEGIN and END lines.
pub(super) fn der_from_pem(pem: &str) -> Option<Vec<u8>> {
    let body: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
    super::encode::from_base64(body.trim())
}

/// Makes an authority and a certificate for localhost and 127.0.0.1; answers the TLS
/// configuration and the path of the authority's certificate.
pub(super) fn tls_config(dir: &Path) -> (Arc<ServerConfig>, PathBuf) {
    let mut authority = rcgen::CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    authority.distinguished_name.push(rcgen::DnType::CommonName, "object storage test authority");
    authority.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let authority = rcgen::CertifiedIssuer::self_signed(authority, authority_key).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let names = vec!["localhost".to_string(), "127.0.0.1".to_string()];
    let mut leaf = rcgen::CertificateParams::new(names).unwrap();
    leaf.use_authority_key_identifier_extension = true;
    let leaf = leaf.signed_by(&key, &authority).unwrap();
    let path = dir.join("ca.pem");
    fs::write(&path, authority.pem()).unwrap();
    // The provider is named because a test binary may hold several.
    let provider = Arc::new(tokio_rustls::rustls::crypto::aws_lc_rs::default_provider());
    let private = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], private)
        .unwrap();
    (Arc::new(config), path)
}
