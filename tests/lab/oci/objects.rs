//! Buckets and objects: reading, writing, deleting, listing.

use super::Shared;
use super::clock::{http_date, rfc3339};
use super::content::{self, Algorithm, Payload};
use super::encode::uuid;
use super::http::{Answer, Call, Failure, Upload, answer, answer_json, set};
use super::store::{Conditions, Object, Versioning, kept_headers};
use hyper::Response;
use hyper::http::request::Parts;
use serde_json::{Map, json};
use std::ops::Range;

const LISTING_LIMIT: usize = 1000;

pub(super) fn bucket(shared: &Shared, call: &Call) -> Answer {
    let state = shared.bucket(call)?;
    let bucket = &state.buckets[&call.bucket];
    let versioning = match bucket.versioning {
        Versioning::Disabled => "Disabled",
        Versioning::Enabled => "Enabled",
        Versioning::Suspended => "Suspended",
    };
    let mut response = answer_json(&json!({
        "namespace": shared.namespace,
        "name": bucket.name,
        "id": format!("ocid1.bucket.oc1.test.{}", bucket.etag),
        "compartmentId": "ocid1.compartment.oc1..test",
        "createdBy": "ocid1.user.oc1..test",
        "timeCreated": rfc3339(bucket.created),
        "etag": bucket.etag,
        "metadata": {},
        "publicAccessType": "NoPublicAccess",
        "storageTier": "Standard",
        "objectEventsEnabled": false,
        "replicationEnabled": false,
        "isReadOnly": false,
        "versioning": versioning,
        "autoTiering": "Disabled",
    }));
    set(&mut response, "etag", &bucket.etag);
    Ok(response)
}

/// The size the client declares, which the quota is checked against before the body is read.
pub(super) fn declared_length(head: &Parts) -> Result<u64, Failure> {
    let length = head.headers.get("content-length").and_then(|value| value.to_str().ok());
    length
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| Failure::new(411, "MissingContentLength", "The Content-Length is required"))
}

pub(super) async fn put(
    shared: &Shared,
    call: &Call,
    head: &Parts,
    upload: &mut Upload,
    signed_hash: Option<&str>,
) -> Answer {
    let conditions = Conditions::from_headers(&head.headers)?;
    let algorithm = Algorithm::from_headers(&head.headers)?;
    let length = declared_length(head)?;
    {
        let state = shared.bucket(call)?;
        let bucket = &state.buckets[&call.bucket];
        conditions.check_write(bucket.objects.get(call.object()))?;
        bucket.check_retention(call.object())?;
        bucket.check_quota(length)?;
    }
    let path = shared.new_blob();
    let received = content::receive(upload, path, &head.headers, algorithm, signed_hash).await?;
    let checksums = received.checksum_headers("content-md5");
    let object = Object {
        etag: uuid(),
        version_id: None,
        size: received.blob.len,
        modified: shared.now(),
        headers: kept_headers(&head.headers),
        md5: checksums[0].1.clone(),
        checksums,
        blobs: vec![received.blob.clone()],
    };
    // The state may have moved on while the body came in: of two creators only one may win.
    let mut state = shared.bucket(call)?;
    let bucket = state.buckets.get_mut(&call.bucket).unwrap();
    let object = bucket.store(call.object(), object, &conditions)?;
    let mut response = answer(200, Payload::empty());
    for (name, value) in received.checksum_headers("opc-content-md5") {
        set(&mut response, &name, &value);
    }
    stored_headers(&mut response, &object);
    Ok(response)
}

/// What the answer to a finished write says of the object.
pub(super) fn stored_headers(response: &mut Response<Payload>, object: &Object) {
    set(response, "etag", &object.etag);
    set(response, "last-modified", &http_date(object.modified, "GMT"));
    if let Some(id) = &object.version_id {
        set(response, "version-id", id);
    }
}

fn not_found(call: &Call) -> Failure {
    let message =
        format!("The object '{}' was not found in the bucket '{}'", call.object(), call.bucket);
    Failure::new(404, "ObjectNotFound", message)
}

pub(super) fn get(shared: &Shared, call: &Call, head: &Parts) -> Answer {
    let object = {
        let state = shared.bucket(call)?;
        let bucket = &state.buckets[&call.bucket];
        let present = bucket.objects.get(call.object());
        let found = match call.param("versionId") {
            None => present,
            Some(id) => bucket
                .former
                .iter()
                .filter(|(name, _)| name == call.object())
                .map(|(_, object)| object)
                .chain(present)
                .find(|object| object.version_id.as_deref() == Some(id)),
        };
        found.cloned().ok_or_else(|| not_found(call))?
    };
    let conditions = Conditions::from_headers(&head.headers)?;
    conditions.check_match(Some(&object))?;
    if conditions.if_none_match.is_some_and(|etag| etag == "*" || etag == object.etag) {
        let mut response = answer(304, Payload::empty());
        set(&mut response, "etag", &object.etag);
        return Ok(response);
    }
    let range = head.headers.get("range").and_then(|value| value.to_str().ok());
    let wanted = range.and_then(|text| parse_range(text, object.size));
    let (status, span) = match wanted {
        None => (200, 0..object.size),
        Some(Ok(span)) => (206, span),
        Some(Err(())) => {
            let text = "The range of the request is not within the object";
            return Err(Failure::new(416, "InvalidRange", text));
        }
    };
    let mut response = answer(status, Payload::range(&object.blobs, span.clone()));
    set(&mut response, "accept-ranges", "bytes");
    set(&mut response, "content-type", "application/octet-stream");
    set(&mut response, "storage-tier", "Standard");
    for (name, value) in object.headers.iter().chain(&object.checksums) {
        set(&mut response, name, value);
    }
    if status == 206 {
        let text = format!("bytes {}-{}/{}", span.start, span.end - 1, object.size);
        set(&mut response, "content-range", &text);
    }
    stored_headers(&mut response, &object);
    Ok(response)
}

/// None for what is not a single range, which is then ignored; an error for one out of reach.
fn parse_range(text: &str, size: u64) -> Option<Result<Range<u64>, ()>> {
    let (start, end) = text.strip_prefix("bytes=")?.split_once('-')?;
    let span = match (start.parse::<u64>(), end.parse::<u64>()) {
        (Ok(start), Ok(end)) if start <= end => start..end.saturating_add(1).min(size),
        (Ok(start), Err(_)) if end.is_empty() => start..size,
        (Err(_), Ok(last)) if start.is_empty() => size.saturating_sub(last)..size,
        _ => return None,
    };
    Some(if span.start < span.end { Ok(span) } else { Err(()) })
}

pub(super) fn delete(shared: &Shared, call: &Call, head: &Parts) -> Answer {
    let conditions = Conditions::from_headers(&head.headers)?;
    let mut state = shared.bucket(call)?;
    let bucket = state.buckets.get_mut(&call.bucket).unwrap();
    if let Some(id) = call.param("versionId") {
        bucket.former.retain(|(name, object)| {
            name != call.object() || object.version_id.as_deref() != Some(id)
        });
        let current = bucket.objects.get(call.object());
        if current.is_some_and(|object| object.version_id.as_deref() == Some(id)) {
            bucket.objects.remove(call.object());
        }
        return Ok(answer(204, Payload::empty()));
    }
    let Some(object) = bucket.objects.get(call.object()) else {
        let message = format!(
            "The object '{}' does not exist in bucket '{}' with namespace '{}'",
            call.object(),
            call.bucket,
            call.namespace
        );
        return Err(Failure::new(404, "ObjectNotFound", message));
    };
    conditions.check_match(Some(object))?;
    bucket.check_retention(call.object())?;
    let object = bucket.remove(call.object()).unwrap();
    let mut response = answer(204, Payload::empty());
    set(&mut response, "last-modified", &http_date(object.modified, "GMT"));
    if bucket.versioning == Versioning::Enabled {
        set(&mut response, "is-delete-marker", "true");
        set(&mut response, "version-id", &uuid());
    }
    Ok(response)
}

/// The objects of a bucket; `scope` is the prefix a pre-authenticated request is bound to.
pub(super) fn list(shared: &Shared, call: &Call, scope: &str) -> Answer {
    let limit = match call.param("limit") {
        None => LISTING_LIMIT,
        Some(text) => match text.parse() {
            Ok(limit @ 1..=LISTING_LIMIT) => limit,
            _ => return Err(Failure::new(400, "InvalidLimit", "The limit is not valid")),
        },
    };
    let fields = call.param("fields").unwrap_or("name").to_lowercase();
    let fields: Vec<&str> = fields.split(',').map(str::trim).collect();
    let prefix = call.param("prefix").unwrap_or(scope);
    let delimiter = call.param("delimiter").filter(|text| !text.is_empty());
    let (start, after) = (call.param("start").unwrap_or(""), call.param("startAfter"));
    let state = shared.bucket(call)?;
    let mut objects = Vec::new();
    let mut prefixes: Vec<String> = Vec::new();
    let mut next = None;
    for (name, object) in state.buckets[&call.bucket].objects.range(start.to_string()..) {
        if call.param("end").is_some_and(|end| name.as_str() >= end) {
            break;
        }
        if !name.starts_with(prefix) || after.is_some_and(|after| name.as_str() <= after) {
            continue;
        }
        let group = delimiter.and_then(|delimiter| {
            let end = prefix.len() + name[prefix.len()..].find(delimiter)? + delimiter.len();
            Some(name[..end].to_string())
        });
        // Names are in order, so a group's members follow each other.
        if group.is_some() && prefixes.last() == group.as_ref() {
            continue;
        }
        if objects.len() + prefixes.len() == limit {
            next = Some(name.clone());
            break;
        }
        match group {
            Some(group) => prefixes.push(group),
            None => objects.push(summary(name, object, &fields)),
        }
    }
    let mut listing = json!({"objects": objects, "prefixes": prefixes});
    if let Some(next) = next {
        listing["nextStartWith"] = json!(next);
    }
    Ok(answer_json(&listing))
}

fn summary(name: &str, object: &Object, fields: &[&str]) -> serde_json::Value {
    let time = rfc3339(object.modified);
    let all = [
        ("name", json!(name)),
        ("size", json!(object.size)),
        ("etag", json!(object.etag)),
        ("md5", json!(object.md5)),
        ("timeCreated", json!(time)),
        ("timeModified", json!(time)),
        ("storageTier", json!("Standard")),
    ];
    let wanted = |field: &str| field == "name" || fields.contains(&field.to_lowercase().as_str());
    let chosen = all.into_iter().filter(|(field, _)| wanted(field));
    chosen.map(|(field, value)| (field.to_string(), value)).collect::<Map<_, _>>().into()
}
