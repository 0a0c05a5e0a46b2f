//! AWS Signature Version 4, in the `Authorization` header, with the body's
//! own SHA-256: a store that verifies it refuses what was damaged on the way.
//!
//! Source: AWS, "Authenticating Requests: Using the Authorization Header".

use aws_lc_rs::hmac;
use sha2::{Digest, Sha256};

use crate::{model::Timestamp, store::http::encoded};

/// Who signs.
#[derive(Clone)]
pub struct Credentials {
    /// Not a secret.
    pub access_key_id: String,
    /// The secret.
    pub secret_access_key: String,
    /// Of temporary credentials; a secret, too.
    pub session_token: Option<String>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials({})", self.access_key_id)
    }
}

/// What is signed of a request.
#[derive(Debug)]
pub struct Unsigned<'a> {
    pub method: &'a str,
    /// Encoded.
    pub path: &'a str,
    /// Names and values, not encoded, in any order.
    pub query: &'a [(&'a str, String)],
    pub host: &'a str,
    /// Further headers that are sent, names in lower case.
    pub headers: &'a [(&'static str, String)],
    /// SHA-256 of the body, in hex.
    pub content_sha256: String,
}

/// The query as it is sent and signed.
pub fn canonical_query(query: &[(&str, String)]) -> String {
    let mut pairs: Vec<_> =
        query.iter().map(|(name, value)| format!("{}={}", encoded(name), encoded(value))).collect();
    pairs.sort();
    pairs.join("&")
}

/// Everything but `host` and `content-length` that is to be sent.
pub fn sign(
    request: &Unsigned<'_>,
    credentials: &Credentials,
    region: &str,
    now: Timestamp,
) -> Vec<(&'static str, String)> {
    let time = basic(now);
    let day = &time[..8];
    let mut headers = request.headers.to_vec();
    headers.push(("x-amz-content-sha256", request.content_sha256.clone()));
    headers.push(("x-amz-date", time.clone()));
    headers.extend(credentials.session_token.clone().map(|token| ("x-amz-security-token", token)));
    let mut signed: Vec<(&str, &str)> =
        headers.iter().map(|(name, value)| (*name, value.trim())).collect();
    signed.push(("host", request.host));
    signed.sort_unstable();
    let names: Vec<_> = signed.iter().map(|(name, _)| *name).collect();
    let names = names.join(";");
    let lines: String = signed.iter().map(|(name, value)| format!("{name}:{value}\n")).collect();

    let canonical = format!(
        "{}\n{}\n{}\n{lines}\n{names}\n{}",
        request.method,
        request.path,
        canonical_query(request.query),
        request.content_sha256,
    );
    let scope = format!("{day}/{region}/s3/aws4_request");
    let text = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{}", hex(&Sha256::digest(&canonical)));

    let secret = format!("AWS4{}", credentials.secret_access_key);
    let key = [day, region, "s3", "aws4_request"]
        .iter()
        .fold(secret.into_bytes(), |key, word| hmac(&key, word));
    let signature = hex(&hmac(&key, &text));
    let access_key_id = &credentials.access_key_id;
    headers.push((
        "authorization",
        format!(
            "AWS4-HMAC-SHA256 Credential={access_key_id}/{scope},SignedHeaders={names},\
             Signature={signature}"
        ),
    ));
    headers
}

fn hmac(key: &[u8], text: &str) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    hmac::sign(&key, text.as_bytes()).as_ref().to_vec()
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `20130524T000000Z`.
fn basic(time: Timestamp) -> String {
    let text = time.to_string();
    let digits: String = text.chars().take(19).filter(|c| !matches!(c, '-' | ':')).collect();
    format!("{digits}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of AWS's documentation: the key, the bucket and the day
    /// are theirs.
    fn signature(
        method: &str,
        path: &str,
        query: &[(&str, String)],
        headers: &[(&'static str, String)],
        body: &[u8],
    ) -> String {
        let request = Unsigned {
            method,
            path,
            query,
            host: "examplebucket.s3.amazonaws.com",
            headers,
            content_sha256: hex(&Sha256::digest(body)),
        };
        let credentials = Credentials {
            access_key_id: "AKIAIOSFODNN7EXAMPLE".into(),
            secret_access_key: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".into(),
            session_token: None,
        };
        let now = Timestamp::from_millis(1_369_353_600_000);
        let headers = sign(&request, &credentials, "us-east-1", now);
        let (_, authorization) = headers.last().unwrap();
        authorization.rsplit_once("Signature=").unwrap().1.to_owned()
    }

    #[test]
    fn the_documented_examples_are_signed_as_documented() {
        let range = [("range", "bytes=0-9".to_owned())];
        assert_eq!(
            signature("GET", "/test.txt", &[], &range, b""),
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
        );
        let put = [
            ("date", "Fri, 24 May 2013 00:00:00 GMT".to_owned()),
            ("x-amz-storage-class", "REDUCED_REDUNDANCY".to_owned()),
        ];
        assert_eq!(
            signature("PUT", "/test%24file.text", &[], &put, b"Welcome to Amazon S3."),
            "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"
        );
        let list = [("prefix", "J".to_owned()), ("max-keys", "2".to_owned())];
        assert_eq!(
            signature("GET", "/", &list, &[], b""),
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"
        );
        assert_eq!(
            signature("GET", "/", &[("lifecycle", String::new())], &[], b""),
            "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"
        );
    }

    #[test]
    fn secrets_are_not_shown() {
        let credentials = Credentials {
            access_key_id: "AK".into(),
            secret_access_key: "hush".into(),
            session_token: Some("hush".into()),
        };
        assert_eq!(format!("{credentials:?}"), "Credentials(AK)");
    }
}
