//! What OCI answers, and what it is told, in JSON. Also what its
//! pre-authenticated requests answer.

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use md5::{Digest, Md5};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::Sha256;

use crate::{
    error::{Error, Reason, Result},
    model::ByteSize,
    store::{
        bucket::{ETag, ListedPart, Page, StoredAs},
        http::{Answer, Refusal, Trouble, shown},
    },
};

/// Metadata that an upload is marked with.
pub const MARK: &str = "opc-meta-imaged-upload";
/// Asks for a checksum of each part.
pub const ALGORITHM: &str = "opc-checksum-algorithm";
/// The checksum of a part.
pub const CONTENT_SHA256: &str = "opc-content-sha256";

/// A page of a list of objects.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Listing {
    pub objects: Vec<Named>,
    /// The first name that is not in it.
    pub next_start_with: Option<String>,
}

impl From<Listing> for Page {
    fn from(listing: Listing) -> Self {
        let keys = listing.objects.into_iter().map(|object| object.name).collect();
        Self { keys, next: listing.next_start_with }
    }
}

/// An object of a list.
#[derive(Debug, Deserialize)]
pub struct Named {
    pub name: String,
}

/// A part of an upload.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Listed {
    part_number: u32,
    etag: String,
    /// In base64.
    md5: Option<String>,
    size: u64,
}

impl From<Listed> for ListedPart {
    fn from(listed: Listed) -> Self {
        let Listed { part_number: number, etag, md5, size } = listed;
        let hex = |md5: String| {
            let bytes = STANDARD.decode(md5).ok()?;
            Some(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
        };
        Self { number, etag: ETag(etag), size: ByteSize(size), md5: md5.and_then(hex) }
    }
}

/// An upload.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Begun {
    pub object: String,
    pub upload_id: String,
    /// A secret: it gives access to the upload where nothing is signed.
    pub access_uri: Option<String>,
}

#[derive(Serialize)]
struct Beginning<'a> {
    object: &'a str,
    metadata: std::collections::BTreeMap<&'static str, &'a str>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Completion<'a> {
    parts_to_commit: Vec<Committed<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Committed<'a> {
    part_num: u32,
    etag: &'a str,
}

/// What is wrong, in the service's words.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Problem {
    code: String,
    message: String,
}

/// The order to begin the upload of `object`.
pub fn beginning(object: &str, mark: &str) -> Result<Bytes> {
    document(&Beginning { object, metadata: [(MARK, mark)].into() })
}

/// The order to complete an upload.
pub fn completion(parts: &[StoredAs]) -> Result<Bytes> {
    let committed =
        parts.iter().map(|part| Committed { part_num: part.number, etag: &part.etag.0 });
    document(&Completion { parts_to_commit: committed.collect() })
}

fn document(value: &impl Serialize) -> Result<Bytes> {
    let written = serde_json::to_vec(value).map_err(|cause| {
        Error::new(Reason::Internal, "an order to OCI cannot be written as JSON").because(cause)
    });
    Ok(written?.into())
}

/// `answer` understood, or `None`. Why not is not said: what it has may be a
/// secret.
pub fn parse<T: DeserializeOwned>(answer: &Answer) -> Option<T> {
    serde_json::from_slice(&answer.body).ok()
}

/// Why a request was refused.
pub fn refusal(answer: &Answer) -> Refusal {
    let Problem { code, message } = parse(answer).unwrap_or_default();
    Refusal {
        status: answer.status.as_u16(),
        code: shown(&code),
        message: shown(&message),
        request_id: shown(answer.header("opc-request-id")),
    }
}

/// What is to be done about a refusal. Codes: OCI, "API Errors", and those
/// that its SDKs ask again after.
pub fn trouble(refusal: &Refusal) -> Trouble {
    match refusal.code.as_str() {
        "BucketNotFound" | "NamespaceNotFound" | "NotAuthorizedOrNotFound" => Trouble::NoBucket,
        "RetentionRuleViolation" => Trouble::Retained,
        "QuotaExceeded" | "LimitExceeded" => Trouble::Full,
        "IncorrectState" | "LockConflict" | "ConcurrentObjectUpdate" => Trouble::Passing,
        "IncompleteBody" => Trouble::Damaged,
        code if code.starts_with("UnmatchedContent") => Trouble::Damaged,
        _ => match refusal.status {
            501 => Trouble::Other,
            408 | 429 | 500.. => Trouble::Passing,
            401 => Trouble::Credentials,
            403 => Trouble::Rights,
            _ => Trouble::Other,
        },
    }
}

/// Whether the refusal is about the clock: its words are the only sign where
/// something on the way gives the answer a date of its own.
pub fn blames_clock(refusal: &Refusal) -> bool {
    refusal.status == 401 && refusal.message.contains("allowed clock skew")
}

/// The whole small object that `answer` brought, if it is what the service
/// says it is; of objects that were made of parts it says nothing. `cannot` is
/// what cannot be done.
///
/// # Errors
///
/// `STORE_UNAVAILABLE`: it was damaged on the way.
pub fn intact(answer: Answer, cannot: impl FnOnce() -> String) -> Result<Bytes> {
    let told = answer.header("content-md5");
    if told.is_empty() || told == md5(&answer.body) {
        return Ok(answer.body);
    }
    let context = format!("{}: what came has another checksum than it tells", cannot());
    Err(Error::new(Reason::StoreUnavailable, context)
        .advice("bytes are damaged on the way: look after the network and what lies in it"))
}

/// As the service writes it.
pub fn md5(bytes: &[u8]) -> String {
    STANDARD.encode(Md5::digest(bytes))
}

/// Whether the completed object of `answer` is made of `parts`, as far as the
/// service tells.
pub fn is_made_of(answer: &Answer, parts: &[StoredAs]) -> bool {
    let told = answer.header("opc-multipart-sha256");
    told.is_empty() || told == multipart_sha256(parts)
}

/// The SHA-256 of the parts' SHA-256s, and how many there are.
fn multipart_sha256(parts: &[StoredAs]) -> String {
    let mut whole = Sha256::new();
    parts.iter().for_each(|part| whole.update(part.sha256.0));
    format!("{}-{}", STANDARD.encode(whole.finalize()), parts.len())
}

/// The error when [`is_made_of`] does not hold; `what` is what cannot be done.
pub fn not_made_of(what: String, answer: &Answer) -> Error {
    let context = format!("{what}: it has put other parts together than were sent");
    let id = shown(answer.header("opc-request-id"));
    Error::new(Reason::ImageCorrupt, context)
        .advice(format!("ask again; if it happens again, tell the service's people (request {id})"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        model::image::ObjectDigest,
        store::{
            bucket::ETag,
            http::{HeaderMap, StatusCode},
        },
    };

    fn answer(
        status: u16,
        headers: &[(&'static str, &'static str)],
        body: &'static [u8],
    ) -> Answer {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, value.parse().unwrap());
        }
        let status = StatusCode::from_u16(status).unwrap();
        Answer { status, headers: map, body: Bytes::from_static(body) }
    }

    /// A value that may stand where another is expected.
    fn value() -> impl Strategy<Value = &'static str> {
        let values = ["7", "-1", "1e99", "18446744073709551616", "\"a\"", "\"=?\"", "null", "[]"];
        prop::sample::select(values.to_vec())
    }

    proptest! {
        /// What looks like an answer, and what does not, is an answer or
        /// nothing.
        #[test]
        fn any_bytes_are_survived(
            bytes in prop::collection::vec(any::<u8>(), 0..400),
            values in prop::collection::vec(value(), 4),
            cut in 0..200_usize,
        ) {
            let [a, b, c, d] = [values[0], values[1], values[2], values[3]];
            let listed = format!(
                "{{\"objects\":[{{\"name\":{a}}}],\"partNumber\":{a},\"etag\":{b},\"md5\":{c},\
                 \"size\":{d},\"object\":{b},\"uploadId\":{c},\"code\":{a},\"message\":{d}}}"
            );
            let cut = &listed.as_bytes()[..cut.min(listed.len())];
            for body in [&bytes[..], cut, listed.as_bytes()] {
                let answer = Answer { body: Bytes::copy_from_slice(body), ..answer(400, &[], b"") };
                _ = parse::<Listing>(&answer).map(Page::from);
                _ = parse::<Listed>(&answer).map(ListedPart::from);
                _ = parse::<Begun>(&answer).map(|begun| begun.upload_id);
                _ = trouble(&refusal(&answer));
            }
        }
    }

    #[test]
    fn lists_are_understood_and_foreign_documents_are_not() {
        let listed = br#"{"objects":[{"name":"a","size":3},{"name":"b"}],"prefixes":[],
            "nextStartWith":"c","more":[]}"#;
        let listing: Listing = parse(&answer(200, &[], listed)).unwrap();
        let names: Vec<_> = listing.objects.into_iter().map(|object| object.name).collect();
        assert_eq!((names.join(","), listing.next_start_with), ("a,b".into(), Some("c".into())));
        let deep: &[u8] = &[b'['; 100_000];
        for foreign in [&b"<html>"[..], b"", b"[]", b"{\"objects\":{}}", b"\xff", b"null"] {
            assert!(parse::<Listing>(&answer(200, &[], foreign)).is_none(), "{foreign:?}");
        }
        assert!(serde_json::from_slice::<Listing>(deep).is_err());
        let begun: Begun =
            parse(&answer(200, &[], br#"{"object":"a","uploadId":"u","accessUri":null}"#)).unwrap();
        assert_eq!((&*begun.upload_id, begun.access_uri), ("u", None));
    }

    #[test]
    fn refusals_are_told_apart_whatever_they_are_worded_in() {
        let told = |status, body: &'static [u8]| {
            let refusal = refusal(&answer(status, &[("opc-request-id", "id-1")], body));
            format!("{:?}: {refusal}", trouble(&refusal))
        };
        let all = [
            told(404, br#"{"code":"BucketNotFound","message":"Either\n\u001b[31m"}"#),
            told(400, br#"{"code":"UnmatchedContentSHA256","message":""}"#),
            told(400, br#"{"code":"QuotaExceeded","message":"full"}"#),
            told(403, br#"{"code":"RetentionRuleViolation","message":"kept"}"#),
            told(409, br#"{"code":"IncorrectState","message":""}"#),
            told(409, br#"{"code":"Other","message":""}"#),
            told(429, b""),
            told(501, b""),
            told(502, b"<html>Bad Gateway</html>"),
            told(401, br#"{"code":7}"#),
            told(403, b"[]"),
            told(404, b"<html>"),
        ];
        insta::assert_snapshot!(all.join("\n"), @"
        NoBucket: 404 BucketNotFound: Either �[31m (request id-1)
        Damaged: 400 UnmatchedContentSHA256 (request id-1)
        Full: 400 QuotaExceeded: full (request id-1)
        Retained: 403 RetentionRuleViolation: kept (request id-1)
        Passing: 409 IncorrectState (request id-1)
        Other: 409 Other (request id-1)
        Passing: 429 Too Many Requests (request id-1)
        Other: 501 Not Implemented (request id-1)
        Passing: 502 Bad Gateway (request id-1)
        Credentials: 401 Unauthorized (request id-1)
        Rights: 403 Forbidden (request id-1)
        Other: 404 Not Found (request id-1)
        ");
    }

    #[test]
    fn an_order_to_complete_names_every_part_and_its_answer_is_compared() {
        let part = |number, etag: &str| StoredAs {
            number,
            etag: ETag(etag.into()),
            sha256: ObjectDigest([0; 32]),
        };
        let parts = [part(1, "a\""), part(3, "b")];
        let told = completion(&parts).unwrap();
        insta::assert_snapshot!(String::from_utf8_lossy(&told), @r#"{"partsToCommit":[{"partNum":1,"etag":"a\""},{"partNum":3,"etag":"b"}]}"#);
        insta::assert_snapshot!(multipart_sha256(&parts), @"9aX9QtFqIDAnmO9u0wmXm0MAPSMg2fDo6pgxqSdZ+0s=-2");
        assert!(is_made_of(&answer(200, &[], b""), &parts));
        let other = answer(200, &[("opc-multipart-sha256", "AAAA-2")], b"");
        assert!(!is_made_of(&other, &parts));
        let begun = beginning("a/\"b", "host").unwrap();
        insta::assert_snapshot!(String::from_utf8_lossy(&begun), @r#"{"object":"a/\"b","metadata":{"opc-meta-imaged-upload":"host"}}"#);
    }

    #[test]
    fn a_small_object_is_compared_with_its_checksum() {
        let of = |answer| intact(answer, || "cannot read a".into()).map_err(|e| e.to_string());
        let told = |md5| of(answer(200, &[("content-md5", md5)], b"hello"));
        assert_eq!(told("XUFAKrxLKna5cZ2REBfFkg==").unwrap(), "hello");
        insta::assert_snapshot!(told("XUFAKrxLKna5cZ2REBfFkQ==").unwrap_err(), @"cannot read a: what came has another checksum than it tells");
        assert_eq!(of(answer(200, &[], b"hello")).unwrap(), "hello");
    }
}
