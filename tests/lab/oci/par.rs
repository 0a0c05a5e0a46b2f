//! Pre-authenticated requests: their management, and the requests that use them.

use super::clock::{parse_rfc3339, rfc3339};
use super::content::Payload;
use super::encode::{percent_encode, token};
use super::http::{Answer, Call, Failure, Upload, answer, answer_json};
use super::store::{Bucket, kept_headers};
use super::{Shared, multipart, objects};
use hyper::http::request::Parts;
use serde_json::{Value, json};

/// What a pre-authenticated request allows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ParAccess {
    /// Reading the one object.
    ObjectRead,
    /// Writing the one object.
    ObjectWrite,
    /// Reading and writing the one object.
    ObjectReadWrite,
    /// Reading any object with the prefix.
    AnyObjectRead,
    /// Writing any object with the prefix.
    AnyObjectWrite,
    /// Reading and writing any object with the prefix.
    AnyObjectReadWrite,
}

impl ParAccess {
    const ALL: [ParAccess; 6] = [
        ParAccess::ObjectRead,
        ParAccess::ObjectWrite,
        ParAccess::ObjectReadWrite,
        ParAccess::AnyObjectRead,
        ParAccess::AnyObjectWrite,
        ParAccess::AnyObjectReadWrite,
    ];

    fn name(self) -> String {
        format!("{self:?}")
    }

    fn is_any(self) -> bool {
        self.name().starts_with("Any")
    }

    fn reads(self) -> bool {
        self.name().contains("Read")
    }

    fn writes(self) -> bool {
        self.name().contains("Write")
    }
}

/// A pre-authenticated request for the server to make.
#[derive(Clone, Debug)]
pub struct ParSpec {
    /// A name for people.
    pub name: String,
    /// What it allows.
    pub access: ParAccess,
    /// The object, or for `AnyObject...` the prefix.
    pub object: Option<String>,
    /// Milliseconds since 1970 by the server's clock.
    pub expires: i64,
    /// Whether it may list the objects.
    pub listing: bool,
}

#[derive(Debug)]
pub(super) struct Par {
    pub id: String,
    pub spec: ParSpec,
    token: String,
    created: i64,
    /// The further tokens handed out for multipart uploads, with the uploads' ids.
    uploads: Vec<(String, String)>,
}

impl Par {
    pub fn new(spec: ParSpec, created: i64) -> Par {
        Par { id: token(), spec, token: token(), created, uploads: Vec::new() }
    }

    /// The path to append to the endpoint.
    pub fn access_uri(&self, namespace: &str, bucket: &str) -> String {
        let object = match &self.spec.object {
            Some(object) if !self.spec.access.is_any() => percent_encode(object),
            _ => String::new(),
        };
        format!("/p/{}/n/{namespace}/b/{bucket}/o/{object}", self.token)
    }

    fn summary(&self) -> Value {
        json!({
            "id": self.id,
            "name": self.spec.name,
            "objectName": self.spec.object,
            "bucketListingAction": if self.spec.listing { "ListObjects" } else { "Deny" },
            "accessType": self.spec.access.name(),
            "timeExpires": rfc3339(self.spec.expires),
            "timeCreated": rfc3339(self.created),
        })
    }

    fn covers(&self, object: &str) -> bool {
        let scope = self.spec.object.as_deref().unwrap_or("");
        if self.spec.access.is_any() { object.starts_with(scope) } else { object == scope }
    }
}

/// Makes a pre-authenticated request as the JSON body says.
pub(super) fn create(shared: &Shared, call: &Call, body: &[u8]) -> Answer {
    let details: Value = serde_json::from_slice(body)
        .map_err(|_| Failure::new(400, "CannotParseRequest", "The body is not valid JSON"))?;
    let text = |field: &str| details[field].as_str().map(str::to_string);
    let missing = |field: &str| Failure::invalid(format!("The {field} is missing or not valid"));
    let access = text("accessType").unwrap_or_default();
    let access = ParAccess::ALL.into_iter().find(|kind| kind.name() == access);
    let access = access.ok_or_else(|| missing("accessType"))?;
    let object = text("objectName");
    if object.is_none() && !access.is_any() {
        return Err(missing("objectName"));
    }
    let expires = text("timeExpires").and_then(|text| parse_rfc3339(&text));
    let spec = ParSpec {
        name: text("name").ok_or_else(|| missing("name"))?,
        access,
        object,
        expires: expires.ok_or_else(|| missing("timeExpires"))?,
        listing: text("bucketListingAction").as_deref() == Some("ListObjects"),
    };
    let par = Par::new(spec, shared.now());
    let mut value = par.summary();
    let uri = par.access_uri(&shared.namespace, &call.bucket);
    value["fullPath"] = json!(format!("{}{uri}", shared.endpoint()));
    value["accessUri"] = json!(uri);
    shared.bucket(call)?.buckets.get_mut(&call.bucket).unwrap().pars.push(par);
    Ok(answer_json(&value))
}

pub(super) fn list(shared: &Shared, call: &Call) -> Answer {
    let state = shared.bucket(call)?;
    let mut items: Vec<(String, Value)> = state.buckets[&call.bucket]
        .pars
        .iter()
        .map(|par| (par.id.clone(), par.summary()))
        .collect();
    items.sort_by(|a, b| a.0.cmp(&b.0));
    multipart::page(shared, call, items.into_iter())
}

fn unknown_par() -> Failure {
    Failure::new(404, "PreauthenticatedRequestNotFound", "No such pre-authenticated request")
}

pub(super) fn get(shared: &Shared, call: &Call) -> Answer {
    let state = shared.bucket(call)?;
    let pars = &state.buckets[&call.bucket].pars;
    let par = pars.iter().find(|par| par.id == call.object()).ok_or_else(unknown_par)?;
    Ok(answer_json(&par.summary()))
}

pub(super) fn delete(shared: &Shared, call: &Call) -> Answer {
    let mut state = shared.bucket(call)?;
    let pars = &mut state.buckets.get_mut(&call.bucket).unwrap().pars;
    let index = pars.iter().position(|par| par.id == call.object()).ok_or_else(unknown_par)?;
    pars.remove(index);
    Ok(answer(204, Payload::empty()))
}

/// Takes `NAME/id/UPLOAD/` or `NAME/id/UPLOAD/PART` apart: object, upload, part.
pub(super) fn upload_target(call: &Call) -> Option<(&str, &str, Option<u32>)> {
    let is_upload = call.token.is_some() && call.collection == "u";
    let (path, part) = call.object.as_deref().filter(|_| is_upload)?.rsplit_once('/')?;
    let (object, id) = path.rsplit_once("/id/")?;
    // Zero stands for a number that is none, which the part numbers exclude.
    Some((object, id, (!part.is_empty()).then(|| part.parse().unwrap_or(0))))
}

/// The request with this token, unless it has expired.
fn find<'a>(bucket: &'a mut Bucket, token: &str, now: i64) -> Option<&'a mut Par> {
    let by_token = |par: &Par| {
        par.token == token || par.uploads.iter().any(|(upload_token, _)| upload_token == token)
    };
    bucket.pars.iter_mut().find(|par| by_token(par) && now < par.spec.expires)
}

/// Answers a request that carries a token in place of a signature. Whatever the token does not
/// cover looks like a bucket that is not there.
pub(super) async fn route(
    shared: &Shared,
    call: &Call,
    head: &Parts,
    upload: &mut Upload,
) -> Answer {
    let token = call.token.as_deref().unwrap_or("");
    let refused = || Failure::bucket(&call.namespace, &call.bucket);
    let method = head.method.as_str();
    if let Some((object, id, part)) = upload_target(call) {
        {
            let mut state = shared.bucket(call)?;
            let bucket = state.buckets.get_mut(&call.bucket).unwrap();
            let par = find(bucket, token, shared.now()).ok_or_else(refused)?;
            if !par.uploads.iter().any(|(upload_token, own)| upload_token == token && own == id) {
                return Err(refused());
            }
        }
        let target = Call {
            namespace: call.namespace.clone(),
            bucket: call.bucket.clone(),
            object: Some(object.to_string()),
            query: call.query.clone(),
            ..Call::default()
        };
        return match (method, part) {
            ("PUT", part) => {
                multipart::store_part(shared, &target, id, part, head, upload, None).await
            }
            ("POST", None) => {
                let body = upload.json(None).await?;
                let body = (!body.is_empty()).then_some(&body[..]);
                multipart::finish(shared, &target, id, head, body)
            }
            ("DELETE", None) => multipart::discard(shared, &target, id),
            ("GET", None) if shared.par_can_list_parts => multipart::parts_of(shared, &target, id),
            _ => Err(refused()),
        };
    }

    let scope = {
        let mut state = shared.bucket(call)?;
        let bucket = state.buckets.get_mut(&call.bucket).unwrap();
        let par = find(bucket, token, shared.now()).ok_or_else(refused)?;
        let (access, listing) = (par.spec.access, par.spec.listing);
        let scope = par.spec.object.clone().unwrap_or_default();
        let allowed = par.token == token
            && call.collection == "o"
            && match (method, call.object.as_deref()) {
                ("GET", None) => {
                    let prefix = call.param("prefix").unwrap_or("");
                    access.is_any() && listing && prefix.starts_with(&scope)
                }
                ("GET" | "HEAD", Some(object)) => access.reads() && par.covers(object),
                ("PUT", Some(object)) => access.writes() && par.covers(object),
                _ => false,
            };
        if !allowed {
            return Err(refused());
        }
        scope
    };
    match method {
        "PUT" if head.headers.get("opc-multipart").is_some_and(|value| value == "true") => {
            start_multipart(shared, call, head)
        }
        "PUT" => objects::put(shared, call, head, upload, None).await,
        _ if call.object.is_none() => objects::list(shared, call, &scope),
        _ => objects::get(shared, call, head),
    }
}

/// Starts a multipart upload and hands out the URI, with a token of its own, for its parts.
fn start_multipart(shared: &Shared, call: &Call, head: &Parts) -> Answer {
    let headers = kept_headers(&head.headers);
    let (id, mut value) = multipart::start(shared, call, head, call.object(), headers)?;
    let upload_token = token();
    let object = percent_encode(call.object());
    let uri =
        format!("/p/{upload_token}/n/{}/b/{}/u/{object}/id/{id}/", call.namespace, call.bucket);
    value["accessUri"] = json!(uri);
    let mut state = shared.bucket(call)?;
    let bucket = state.buckets.get_mut(&call.bucket).unwrap();
    let par = find(bucket, call.token.as_deref().unwrap_or(""), shared.now());
    let refused = || Failure::bucket(&call.namespace, &call.bucket);
    par.ok_or_else(refused)?.uploads.push((upload_token, id));
    Ok(answer_json(&value))
}
