//! API signing keys: RSA in PEM, as `openssl` and the OCI Console make them.

use aws_lc_rs::{
    encoding::{AsDer, PublicKeyX509Der},
    error::{KeyRejected, Unspecified},
    signature::{KeyPair, RsaKeyPair},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use md5::{Digest, Md5};

/// Why a file holds no key that can be used. Never says what is in it.
#[derive(Debug, thiserror::Error)]
pub enum BadKey {
    /// It must be decrypted first.
    #[error("it is encrypted")]
    Encrypted,
    /// There is none of the two forms.
    #[error("it has neither a BEGIN PRIVATE KEY nor a BEGIN RSA PRIVATE KEY line")]
    None,
    /// What is between the lines is damaged.
    #[error("what it holds is no Base64")]
    Damaged,
    /// It is no RSA key, or one that is too short.
    #[error("what it holds is no RSA key of 2048 bits or more")]
    Unusable(#[source] KeyRejected),
}

/// The private key in `pem`: PKCS #8 or PKCS #1, not encrypted. What is
/// around it is ignored: the Console ends its files with a word of its own.
pub fn parse(pem: &str) -> Result<RsaKeyPair, BadKey> {
    if pem.contains("BEGIN ENCRYPTED PRIVATE KEY") || pem.contains("Proc-Type: 4,ENCRYPTED") {
        return Err(BadKey::Encrypted);
    }
    if let Some(der) = der(pem, "PRIVATE KEY") {
        return RsaKeyPair::from_pkcs8(&der?).map_err(BadKey::Unusable);
    }
    let der = der(pem, "RSA PRIVATE KEY").ok_or(BadKey::None)?;
    RsaKeyPair::from_der(&der?).map_err(BadKey::Unusable)
}

fn der(pem: &str, label: &str) -> Option<Result<Vec<u8>, BadKey>> {
    let (_, rest) = pem.split_once(&format!("-----BEGIN {label}-----"))?;
    let (text, _) = rest.split_once(&format!("-----END {label}-----"))?;
    let text: String = text.split_whitespace().collect();
    Some(STANDARD.decode(text).map_err(|_| BadKey::Damaged))
}

/// What OCI calls the key: the MD5 of its public part.
pub fn fingerprint(key: &RsaKeyPair) -> Result<String, Unspecified> {
    let public: PublicKeyX509Der<'_> = key.public_key().as_der()?;
    let digits: Vec<_> =
        Md5::digest(public.as_ref()).iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(digits.join(":"))
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::encoding::Pkcs8V1Der;

    use super::*;
    use crate::store::oci::sign::tests::KEY;

    #[test]
    fn both_forms_are_the_same_key() {
        let key = parse(KEY).unwrap();
        let der: Pkcs8V1Der<'_> = key.as_der().unwrap();
        let text = STANDARD.encode(der.as_ref());
        let pem = format!("-----BEGIN PRIVATE KEY-----\n{text}\n-----END PRIVATE KEY-----\nOCI\n");
        let fingerprints = [key, parse(&pem).unwrap()].map(|key| fingerprint(&key).unwrap());
        assert_eq!(fingerprints, ["b3:27:e7:71:32:5d:50:98:ad:f8:c0:aa:fa:7f:92:8d"; 2]);
    }

    #[test]
    fn what_is_no_key_is_told_apart() {
        let said = [
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----",
            "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n",
            "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
            "-----BEGIN PRIVATE KEY-----\nAAAA",
            "-----BEGIN PRIVATE KEY-----\n?\n-----END PRIVATE KEY-----",
            "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----",
        ]
        .map(|pem| parse(pem).unwrap_err().to_string());
        insta::assert_snapshot!(said.join("\n"), @"
        it is encrypted
        it is encrypted
        it has neither a BEGIN PRIVATE KEY nor a BEGIN RSA PRIVATE KEY line
        it has neither a BEGIN PRIVATE KEY nor a BEGIN RSA PRIVATE KEY line
        what it holds is no Base64
        what it holds is no RSA key of 2048 bits or more
        ");
    }
}
