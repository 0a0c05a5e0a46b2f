//! Signatures of OCI's API, version 1: RSA-SHA256 over some headers.
//!
//! Source: OCI, "Request Signatures"; draft-cavage-http-signatures-08. What
//! is signed of which request is what OCI's own SDK signs: of the bytes of
//! objects and parts no header, because the service is told their checksums
//! and says in words of its own when they do not match. A body that does not
//! match what was signed looks like a wrong key.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{RSA_PKCS1_SHA256, RsaKeyPair},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use sha2::{Digest, Sha256};

use crate::{
    error::{Error, Reason, Result},
    model::Timestamp,
};

/// Who signs.
pub struct Credentials {
    /// `tenancy/user/fingerprint`; not a secret.
    pub key_id: String,
    /// The secret.
    pub key: RsaKeyPair,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({})", self.key_id)
    }
}

/// What is signed of a request.
#[derive(Debug)]
pub struct Unsigned<'a> {
    pub method: &'a str,
    /// Path and query as they are sent.
    pub target: &'a str,
    pub host: &'a str,
    /// A document in JSON, which is signed with the request.
    pub document: Option<&'a [u8]>,
}

/// Everything but `host` and `content-length` that is to be sent.
///
/// # Errors
///
/// `INTERNAL`.
pub fn sign(
    request: &Unsigned<'_>,
    credentials: &Credentials,
    now: Timestamp,
) -> Result<Vec<(&'static str, String)>> {
    let time = SystemTime::UNIX_EPOCH + Duration::from_millis(now.as_millis());
    let mut headers = vec![("date", httpdate::fmt_http_date(time))];
    let target = format!("{} {}", request.method.to_ascii_lowercase(), request.target);
    let mut signed = vec![
        ("date", headers[0].1.clone()),
        ("(request-target)", target),
        ("host", request.host.to_owned()),
    ];
    if let Some(document) = request.document {
        let content = [
            ("content-type", "application/json".to_owned()),
            ("x-content-sha256", STANDARD.encode(Sha256::digest(document))),
        ];
        headers.extend(content.clone());
        signed.push(("content-length", document.len().to_string()));
        signed.extend(content);
    }
    let names: Vec<_> = signed.iter().map(|(name, _)| *name).collect();
    let lines: Vec<_> = signed.iter().map(|(name, value)| format!("{name}: {value}")).collect();

    let key = &credentials.key;
    let mut signature = vec![0; key.public_modulus_len()];
    key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), lines.join("\n").as_bytes(), &mut signature)
        .map_err(|cause| {
            Error::new(Reason::Internal, "a request cannot be signed").because(cause)
        })?;
    headers.push((
        "authorization",
        format!(
            "Signature algorithm=\"rsa-sha256\",headers=\"{}\",keyId=\"{}\",signature=\"{}\",\
             version=\"1\"",
            names.join(" "),
            credentials.key_id,
            STANDARD.encode(signature)
        ),
    ));
    Ok(headers)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::store::oci::key;

    /// A key that is used nowhere else.
    pub const KEY: &str = include_str!("vector.pem");

    pub fn credentials() -> Credentials {
        let key = key::parse(KEY).unwrap();
        let fingerprint = key::fingerprint(&key).unwrap();
        Credentials { key_id: format!("ocid1.tenancy.oc1..t/ocid1.user.oc1..u/{fingerprint}"), key }
    }

    fn authorization(method: &str, target: &str, document: Option<&[u8]>) -> String {
        let host = "objectstorage.eu-frankfurt-1.oraclecloud.com";
        let request = Unsigned { method, target, host, document };
        let now = Timestamp::from_millis(1_388_957_500_000);
        let headers = sign(&request, &credentials(), now).unwrap();
        assert_eq!(headers[0], ("date", "Sun, 05 Jan 2014 21:31:40 GMT".into()));
        headers.last().unwrap().1.clone()
    }

    /// Made by the Python SDK, oci 2.189.0, with the same key.
    #[test]
    fn signatures_are_those_of_the_official_sdk() {
        let listed = authorization("GET", "/n/ns/b/images/o?prefix=a%2Fb&limit=1000", None);
        insta::assert_snapshot!(listed, @r#"Signature algorithm="rsa-sha256",headers="date (request-target) host",keyId="ocid1.tenancy.oc1..t/ocid1.user.oc1..u/b3:27:e7:71:32:5d:50:98:ad:f8:c0:aa:fa:7f:92:8d",signature="NvadZmzXWutAbz/qg+83EjRgHX+1hYUA4Y0zvRj4iJCRcU7m+9KkfBgmceQC+8vhfHFd5lxYRugnhUzHaUNY00mgVZ/hOUnsBdhvJ+mp9YDplPUDL0/ipvh91I6fG4hupLf4BSHPdigbL8lMOh0bbH3Mw0a6q/jFUfqw1Gj1uVYOgz8DXO9A+PPI3M2JZI6E5egQew3KZlVfb6G0ZR4WHBYRAJGiV+kYh+2H0P0S5Ev0G8Xdyrd4JmD5xxiJ0T5Pw7NLcEP90NQ6AuwvWADbHN14ZXO3ZPIjMSr6ysa52rBHTTnPaTbYKLw2fwzdZ23oWGBGDCPT6VWBtvukecsAow==",version="1""#);
        let begun = authorization("POST", "/n/ns/b/images/u", Some(br#"{"object":"a"}"#));
        insta::assert_snapshot!(begun, @r#"Signature algorithm="rsa-sha256",headers="date (request-target) host content-length content-type x-content-sha256",keyId="ocid1.tenancy.oc1..t/ocid1.user.oc1..u/b3:27:e7:71:32:5d:50:98:ad:f8:c0:aa:fa:7f:92:8d",signature="YHf8BUb+8ZolmZyIcdsUxX4ERoGc91qQMzNUwY1OJ9Lpr/xif9jVS24eYXpNjpsty4BvOPRH9dpG4N0CvKETsW4+DaModRLJXkT3eBZRJFbhapqHhUA67rJaSZwotnzL2pwWrUhDvkSjZ9+sHxoxLff3MSbj5ut2RHooklO5VePrVYN3UvEDg8PdXtdIbghcoApULe6qFGPve2d68kK/RwuZ4d/YQqEA152uwY6CahnGI/2KB0ew3mGcE5dB+fKVzY0zkp7fHFl7B/tknfyNk8NNcI7kUT63DTWnOxY0qhThip1Re698K4W3tIG4U6HH3HAWeRzCDZALdyc7AkfMHg==",version="1""#);
    }

    #[test]
    fn secrets_are_not_shown() {
        let shown = format!("{:?}", credentials());
        assert!(shown.starts_with("Credentials(ocid1.tenancy") && shown.len() < 120, "{shown}");
    }
}
