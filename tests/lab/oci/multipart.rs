//! Multipart uploads: starting, parts, listing, commit, abort.

use super::Shared;
use super::clock::rfc3339;
use super::content::{self, Algorithm, Payload, multipart_md5};
use super::encode::{base64, from_base64, percent_encode, uuid};
use super::http::{Answer, Call, Failure, Upload, answer, answer_json, set};
use super::objects::{declared_length, stored_headers};
use super::store::{Conditions, Multipart, Object, Part};
use hyper::http::request::Parts;
use serde_json::{Value, json};
use std::collections::BTreeMap;

const PART_NUMBERS: std::ops::RangeInclusive<u32> = 1..=10_000;

/// Starts an upload as the JSON body says.
pub(super) fn create(shared: &Shared, call: &Call, head: &Parts, body: &[u8]) -> Answer {
    let details: Value = serde_json::from_slice(body).map_err(|_| invalid_json())?;
    let object = details["object"].as_str().filter(|name| !name.is_empty());
    let object = object.ok_or_else(|| Failure::invalid("The object name is missing"))?;
    let mut headers = Vec::new();
    for (field, header) in [
        ("contentType", "content-type"),
        ("contentLanguage", "content-language"),
        ("contentEncoding", "content-encoding"),
        ("contentDisposition", "content-disposition"),
        ("cacheControl", "cache-control"),
        ("storageTier", "storage-tier"),
    ] {
        headers.extend(details[field].as_str().map(|value| (header.into(), value.into())));
    }
    for (name, value) in details["metadata"].as_object().into_iter().flatten() {
        if !name.to_lowercase().starts_with("opc-meta-") {
            let message = format!("The metadata key '{name}' does not begin with opc-meta-");
            return Err(Failure::new(400, "InvalidMetadata", message));
        }
        headers.push((name.to_lowercase(), value.as_str().unwrap_or("").to_string()));
    }
    let (id, mut answered) = start(shared, call, head, object, headers)?;
    let object = percent_encode(object);
    let location = format!("/n/{}/b/{}/u/{object}?uploadId={id}", shared.namespace, call.bucket);
    answered["storageTier"] = json!(details["storageTier"].as_str().unwrap_or("Standard"));
    let mut response = answer_json(&answered);
    set(&mut response, "location", &location);
    Ok(response)
}

/// Makes the upload; answers its id and its description.
pub(super) fn start(
    shared: &Shared,
    call: &Call,
    head: &Parts,
    object: &str,
    headers: Vec<(String, String)>,
) -> Result<(String, Value), Failure> {
    let conditions = Conditions::from_headers(&head.headers)?;
    let algorithm = Algorithm::from_headers(&head.headers)?;
    let mut state = shared.bucket(call)?;
    let bucket = state.buckets.get_mut(&call.bucket).unwrap();
    conditions.check_write(bucket.objects.get(object))?;
    let (id, created) = (uuid(), shared.now());
    let parts = BTreeMap::new();
    let upload = Multipart { object: object.to_string(), created, headers, algorithm, parts };
    let described = describe(shared, &call.bucket, &id, &upload);
    bucket.uploads.insert(id.clone(), upload);
    Ok((id, described))
}

fn describe(shared: &Shared, bucket: &str, id: &str, upload: &Multipart) -> Value {
    json!({
        "namespace": shared.namespace,
        "bucket": bucket,
        "object": upload.object,
        "uploadId": id,
        "timeCreated": rfc3339(upload.created),
        "storageTier": "Standard",
    })
}

fn invalid_json() -> Failure {
    Failure::new(400, "CannotParseRequest", "The request body is not valid JSON")
}

fn upload_id(call: &Call) -> Result<&str, Failure> {
    call.param("uploadId").ok_or_else(|| Failure::invalid("The uploadId is missing"))
}

pub(super) async fn put_part(
    shared: &Shared,
    call: &Call,
    head: &Parts,
    upload: &mut Upload,
    signed_hash: Option<&str>,
) -> Answer {
    let number = call.param("uploadPartNum").and_then(|text| text.parse().ok());
    store_part(shared, call, upload_id(call)?, number, head, upload, signed_hash).await
}

/// Receives a part, from a signed request or over a pre-authenticated one.
pub(super) async fn store_part(
    shared: &Shared,
    call: &Call,
    id: &str,
    number: Option<u32>,
    head: &Parts,
    upload: &mut Upload,
    signed_hash: Option<&str>,
) -> Answer {
    let Some(number) = number.filter(|number| PART_NUMBERS.contains(number)) else {
        let text = "The upload part number must be between 1 and 10000";
        return Err(Failure::new(400, "InvalidUploadPartNumber", text));
    };
    let length = declared_length(head)?;
    let algorithm = Algorithm::from_headers(&head.headers)?;
    let algorithm = {
        let mut state = shared.bucket(call)?;
        let bucket = state.buckets.get_mut(&call.bucket).unwrap();
        bucket.check_quota(length)?;
        algorithm.or(bucket.upload(call, id)?.algorithm)
    };
    let path = shared.new_blob();
    let received = content::receive(upload, path, &head.headers, algorithm, signed_hash).await?;
    if shared.forgets_parts {
        received.blob.forget();
    }
    let mut response = answer(200, Payload::empty());
    for (name, value) in received.checksum_headers("opc-content-md5") {
        set(&mut response, &name, &value);
    }
    let part = Part { etag: uuid(), received };
    set(&mut response, "etag", &part.etag);
    // The upload may have been aborted while the part came in.
    let mut state = shared.bucket(call)?;
    let bucket = state.buckets.get_mut(&call.bucket).unwrap();
    bucket.upload(call, id)?.parts.insert(number, part);
    Ok(response)
}

/// How many items of a list one page has.
fn page_limit(shared: &Shared, call: &Call) -> Result<usize, Failure> {
    match call.param("limit").map(str::parse) {
        None => Ok(shared.page_size),
        Some(Ok(limit @ 1..=1000)) => Ok(limit),
        Some(_) => Err(Failure::new(400, "InvalidLimit", "The limit is not valid")),
    }
}

/// One page of items, which stand with their keys in the order of the keys. The token of a page is
/// the last key before it, so that it stays right while items come and go.
pub(super) fn page(
    shared: &Shared,
    call: &Call,
    items: impl Iterator<Item = (String, Value)>,
) -> Answer {
    let limit = page_limit(shared, call)?;
    let invalid = || Failure::new(400, "InvalidPage", "The page is not valid");
    let after = match call.param("page") {
        None => None,
        Some(token) => {
            let key = from_base64(token).and_then(|bytes| String::from_utf8(bytes).ok());
            Some(key.ok_or_else(invalid)?)
        }
    };
    let mut rest = items.filter(|(key, _)| after.as_ref().is_none_or(|after| key > after));
    let page: Vec<(String, Value)> = rest.by_ref().take(limit).collect();
    let more = rest.next().is_some();
    let last = page.last().map(|(key, _)| base64(key.as_bytes()));
    let values: Vec<Value> = page.into_iter().map(|(_, value)| value).collect();
    let mut response = answer_json(&values.into());
    if let (true, Some(token)) = (more, last) {
        set(&mut response, "opc-next-page", &token);
    }
    Ok(response)
}

pub(super) fn list(shared: &Shared, call: &Call) -> Answer {
    let state = shared.bucket(call)?;
    let uploads = &state.buckets[&call.bucket].uploads;
    let mut items: Vec<(String, Value)> = uploads
        .iter()
        .map(|(id, upload)| {
            let key = format!("{}\0{id}", upload.object);
            (key, describe(shared, &call.bucket, id, upload))
        })
        .collect();
    items.sort_by(|a, b| a.0.cmp(&b.0));
    page(shared, call, items.into_iter())
}

pub(super) fn list_parts(shared: &Shared, call: &Call) -> Answer {
    parts_of(shared, call, upload_id(call)?)
}

pub(super) fn parts_of(shared: &Shared, call: &Call, id: &str) -> Answer {
    let mut state = shared.bucket(call)?;
    let bucket = state.buckets.get_mut(&call.bucket).unwrap();
    let upload = bucket.upload(call, id)?;
    let items = upload.parts.iter().map(|(number, part)| {
        let value = json!({
            "partNumber": number,
            "etag": part.etag,
            "md5": base64(&part.received.md5),
            "size": part.received.blob.len,
        });
        (format!("{number:05}"), value)
    });
    page(shared, call, items)
}

pub(super) fn commit(shared: &Shared, call: &Call, head: &Parts, body: &[u8]) -> Answer {
    finish(shared, call, upload_id(call)?, head, Some(body))
}

/// Makes the object of the parts the body names, or of every part if there is no body.
pub(super) fn finish(
    shared: &Shared,
    call: &Call,
    id: &str,
    head: &Parts,
    body: Option<&[u8]>,
) -> Answer {
    let wanted = body.map(parts_to_commit).transpose()?;
    let conditions = Conditions::from_headers(&head.headers)?;
    let mut state = shared.bucket(call)?;
    let bucket = state.buckets.get_mut(&call.bucket).unwrap();
    let upload = bucket.upload(call, id)?;
    let chosen: Vec<&Part> = match &wanted {
        None => upload.parts.values().collect(),
        Some(wanted) => wanted
            .iter()
            .map(|(number, etag)| upload.parts.get(number).filter(|part| part.etag == *etag))
            .collect::<Option<_>>()
            .ok_or_else(|| invalid_part(call, id))?,
    };
    let Some((_, all_but_last)) = chosen.split_last() else {
        return Err(Failure::invalid("There are no parts to commit"));
    };
    if all_but_last.iter().any(|part| part.received.blob.len < shared.min_part_size) {
        return Err(invalid_part(call, id));
    }
    let md5: Vec<[u8; 16]> = chosen.iter().map(|part| part.received.md5).collect();
    let mut checksums = vec![("opc-multipart-md5".to_string(), multipart_md5(&md5))];
    if let Some(algorithm) = upload.algorithm {
        let sums: Vec<(&[u8], u64)> = chosen
            .iter()
            .filter_map(|part| {
                let (kind, sum) = part.received.extra.as_ref()?;
                (*kind == algorithm).then_some((&sum[..], part.received.blob.len))
            })
            .collect();
        if sums.len() != chosen.len() {
            return Err(invalid_part(call, id));
        }
        checksums.push(algorithm.combine(&sums));
    }
    let object = Object {
        etag: uuid(),
        version_id: None,
        size: chosen.iter().map(|part| part.received.blob.len).sum(),
        modified: shared.now(),
        headers: upload.headers.clone(),
        md5: checksums[0].1.clone(),
        checksums,
        blobs: chosen.iter().map(|part| part.received.blob.clone()).collect(),
    };
    let object = bucket.store(call.object(), object, &conditions)?;
    bucket.uploads.remove(id);
    let mut response = answer(200, Payload::empty());
    for (name, value) in &object.checksums {
        set(&mut response, name, value);
    }
    stored_headers(&mut response, &object);
    Ok(response)
}

fn invalid_part(call: &Call, id: &str) -> Failure {
    let message = format!(
        "There were some invalid part (partNum/etag) combination for the upload of '{}' with \
         the id {id}",
        call.object()
    );
    Failure::new(400, "InvalidUploadPart", message)
}

/// The parts a commit names; their order in the object is that of their numbers.
fn parts_to_commit(body: &[u8]) -> Result<BTreeMap<u32, String>, Failure> {
    let details: Value = serde_json::from_slice(body).map_err(|_| invalid_json())?;
    let list = details["partsToCommit"].as_array().ok_or_else(invalid_json)?;
    let pairs = list.iter().map(|part| {
        let number = part["partNum"].as_u64().and_then(|number| number.try_into().ok());
        number.zip(part["etag"].as_str().map(str::to_string)).ok_or_else(invalid_json)
    });
    pairs.collect()
}

pub(super) fn abort(shared: &Shared, call: &Call) -> Answer {
    discard(shared, call, upload_id(call)?)
}

pub(super) fn discard(shared: &Shared, call: &Call, id: &str) -> Answer {
    let mut state = shared.bucket(call)?;
    let bucket = state.buckets.get_mut(&call.bucket).unwrap();
    bucket.upload(call, id)?;
    bucket.uploads.remove(id);
    Ok(answer(204, Payload::empty()))
}
