//! Checks request signatures: draft-cavage-http-signatures-08 as version "1" of OCI has it.

use super::Shared;
use super::clock;
use super::encode::from_base64;
use super::http::{Call, Failure};
use super::keys::der_from_pem;
use aws_lc_rs::signature::{RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey};
use hyper::Method;
use hyper::http::request::Parts;
use std::collections::HashMap;

/// What a client's clock may be off by.
const ALLOWED_SKEW: i64 = 5 * 60 * 1000;
const CONTENT_HEADERS: [&str; 3] = ["content-length", "content-type", "x-content-sha256"];

fn refused() -> Failure {
    let text = "The required information to complete authentication was not provided or was \
                incorrect.";
    Failure::new(401, "NotAuthenticated", text)
}

/// The parameters of `Signature name="value",name="value"`.
fn parameters(authorization: &str) -> Option<HashMap<String, String>> {
    let (scheme, mut rest) = authorization.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("signature") {
        return None;
    }
    let mut found = HashMap::new();
    loop {
        let (name, after) = rest.trim_start().split_once("=\"")?;
        let (value, after) = after.split_once('"')?;
        found.insert(name.to_string(), value.to_string());
        match after.trim_start().strip_prefix(',') {
            Some(next) => rest = next,
            None => return after.trim().is_empty().then_some(found),
        }
    }
}

/// Verifies the request's signature and date; answers the body hash the client signed, if any,
/// for the handler to compare once it has the body.
pub(super) fn verify(
    shared: &Shared,
    call: &Call,
    head: &Parts,
) -> Result<Option<String>, Failure> {
    let authorization = head.headers.get("authorization").and_then(|value| value.to_str().ok());
    let found = authorization.and_then(parameters).ok_or_else(refused)?;
    let field = |name: &str| found.get(name).map(String::as_str).ok_or_else(refused);
    let version = found.get("version").map_or("1", String::as_str);
    if version != "1" || field("algorithm")? != "rsa-sha256" {
        return Err(refused());
    }
    let signed: Vec<&str> = field("headers")?.split(' ').collect();
    let has = |name: &str| signed.contains(&name);
    // The data of an object or a part may go out unhashed, since hashing it means reading it twice;
    // a hash that is sent must be signed, though.
    let is_data = head.method == Method::PUT && call.object.is_some();
    let has_body = matches!(head.method, Method::POST | Method::PUT | Method::PATCH);
    let content_complete = if is_data {
        has("x-content-sha256") || !head.headers.contains_key("x-content-sha256")
    } else {
        !has_body || CONTENT_HEADERS.iter().all(|name| has(name))
    };
    let date_header = if head.headers.contains_key("x-date") { "x-date" } else { "date" };
    let complete = has(date_header) && has("(request-target)") && has("host");
    if !(complete && content_complete) {
        return Err(refused());
    }

    let mut lines = Vec::with_capacity(signed.len());
    for name in &signed {
        let value = if *name == "(request-target)" {
            let target = head.uri.path_and_query().map_or("/", |target| target.as_str());
            format!("{} {target}", head.method.as_str().to_lowercase())
        } else {
            let values: Vec<&str> =
                head.headers.get_all(*name).iter().filter_map(|v| v.to_str().ok()).collect();
            if values.is_empty() {
                return Err(refused());
            }
            values.join(", ")
        };
        lines.push(format!("{name}: {value}"));
    }
    let key_id = field("keyId")?;
    let key = shared.keys.iter().find(|key| key.key_id == key_id).ok_or_else(refused)?;
    let der = der_from_pem(&key.public_key_pem).ok_or_else(refused)?;
    let signature = from_base64(field("signature")?).ok_or_else(refused)?;
    UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, der)
        .verify(lines.join("\n").as_bytes(), &signature)
        .map_err(|_| refused())?;

    let text = head.headers[date_header].to_str().map_err(|_| refused())?;
    let date = clock::parse_http_date(text).ok_or_else(refused)?;
    let now = shared.now();
    if (date - now).abs() > ALLOWED_SKEW {
        let utc = |millis| clock::http_date(millis, "UTC");
        let message = format!(
            "Date '{}' is not within allowed clock skew. Current '{}', valid datetime range: \
             ['{}', '{}']",
            utc(date),
            utc(now),
            utc(now - ALLOWED_SKEW),
            utc(now + ALLOWED_SKEW)
        );
        return Err(Failure::new(401, "NotAuthenticated", message));
    }
    let hash = has("x-content-sha256").then(|| head.headers["x-content-sha256"].to_str());
    Ok(hash.transpose().map_err(|_| refused())?.map(str::to_string))
}

/// The answer to a body that does not match the hash its sender signed.
pub(super) fn body_mismatch() -> Failure {
    refused()
}
