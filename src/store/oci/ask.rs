//! Requests of OCI's API, before they are signed.

use bytes::Bytes;

use crate::{
    model::ByteSize,
    store::{
        bucket::UploadId,
        http::{MAX_ANSWER, Method, Payload, encoded, encoded_path},
    },
};

/// What a request is about.
#[derive(Clone, Copy)]
pub enum About<'a> {
    Namespace,
    Objects,
    Object(&'a str),
    Uploads,
    Upload(&'a str),
}

/// A request, not signed yet.
pub struct Ask<'a> {
    pub method: Method,
    pub about: About<'a>,
    pub query: Vec<(&'static str, String)>,
    pub headers: Vec<(&'static str, String)>,
    pub payload: Payload,
    pub limit: ByteSize,
    /// What is being done, as "the store cannot …".
    pub what: &'a str,
}

impl<'a> Ask<'a> {
    pub fn new(method: Method, about: About<'a>, what: &'a str) -> Self {
        Self {
            method,
            about,
            query: Vec::new(),
            headers: Vec::new(),
            payload: Payload::Nothing,
            limit: MAX_ANSWER,
            what,
        }
    }

    pub fn query(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.query.push((name, value.into()));
        self
    }

    pub fn upload(self, upload: &UploadId) -> Self {
        self.query("uploadId", &upload.name)
    }

    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub fn body(mut self, bytes: Bytes) -> Self {
        self.payload = Payload::Bytes(bytes);
        self
    }

    /// Path and query, as they are sent and signed.
    pub fn target(&self, namespace: &str, bucket: &str) -> String {
        let base = format!("/n/{}/b/{}", encoded(namespace), encoded(bucket));
        let mut target = match self.about {
            About::Namespace => "/n".into(),
            About::Objects => format!("{base}/o"),
            About::Object(key) => format!("{base}/o/{}", encoded_path(key)),
            About::Uploads => format!("{base}/u"),
            About::Upload(key) => format!("{base}/u/{}", encoded_path(key)),
        };
        for (index, (name, value)) in self.query.iter().enumerate() {
            let between = if index == 0 { '?' } else { '&' };
            target.push_str(&format!("{between}{name}={}", encoded(value)));
        }
        target
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_place_in_the_path() {
        let ask = |about| Ask::new(Method::GET, about, "test").query("prefix", "a/b&c=d ?");
        let target = |about| ask(about).query("limit", "2").target("n/s", "b?c");
        assert_eq!(target(About::Objects), "/n/n%2Fs/b/b%3Fc/o?prefix=a%2Fb%26c%3Dd%20%3F&limit=2");
        let upload = Ask::new(Method::PUT, About::Upload("a/%/ü"), "test").target("n", "b");
        assert_eq!(upload, "/n/n/b/b/u/a/%25/%C3%BC");
    }
}
