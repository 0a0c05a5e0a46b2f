//! The URL of a pre-authenticated request, which is the secret itself.

use std::fmt;

use reqwest::Url;

/// What a pre-authenticated request gives access to.
#[derive(Clone)]
pub struct ParUrl {
    /// Scheme, host and port; no secret.
    pub endpoint: String,
    /// The bucket; no secret.
    pub bucket: String,
    /// The one object, decoded; none: objects of the bucket.
    pub object: Option<String>,
    /// Up to the name of the object. A secret.
    base: String,
}

/// Why a text is no such URL. Never says what is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is not of the form https://HOST/p/TOKEN/n/NAMESPACE/b/BUCKET/o/")]
pub struct NoPar;

impl ParUrl {
    /// Reads the URL as the service shows it once.
    pub fn parse(text: &str) -> Result<Self, NoPar> {
        let url = Url::parse(text.trim()).map_err(|_| NoPar)?;
        let plain = url.username().is_empty() && url.password().is_none();
        if !matches!(url.scheme(), "http" | "https") || url.query().is_some() || !plain {
            return Err(NoPar);
        }
        let segments: Vec<_> = url.path().splitn(9, '/').collect();
        let ["", "p", token, "n", namespace, "b", bucket, "o", object] = segments[..] else {
            return Err(NoPar);
        };
        if [token, namespace, bucket].contains(&"") {
            return Err(NoPar);
        }
        let decoded = |text| percent_encoding::percent_decode_str(text).decode_utf8();
        let object = decoded(object).map_err(|_| NoPar)?.into_owned();
        Ok(Self {
            endpoint: url.origin().ascii_serialization(),
            bucket: decoded(bucket).map_err(|_| NoPar)?.into_owned(),
            object: Some(object).filter(|name| !name.is_empty()),
            base: format!("/p/{token}/n/{namespace}/b/{bucket}/o/"),
        })
    }

    /// What gives access to nothing but an upload of `object`, at `path`.
    pub fn of_upload(endpoint: String, bucket: String, object: String, path: String) -> Self {
        Self { endpoint, bucket, object: Some(object), base: path }
    }

    /// Path of the object whose encoded name is `name`. A secret.
    pub fn target(&self, name: &str) -> String {
        format!("{}{name}", self.base)
    }

    /// The secret itself.
    pub fn secret(&self) -> &str {
        &self.base
    }

    /// `text` without the secret, and without that of any other such path,
    /// should who answered have repeated it.
    pub fn without_token(&self, text: &str) -> String {
        let token = self.base.split('/').nth(2).unwrap_or_default();
        let text = text.replace(token, "…");
        let mut parts = text.split("/p/");
        let mut told = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let (_, rest) = part.split_once('/').unwrap_or(("", ""));
            told.push_str(&format!("/p/…/{rest}"));
        }
        told
    }
}

impl fmt::Debug for ParUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ParUrl({}/{})", self.endpoint, self.bucket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart_and_not_shown() {
        let text = "https://os.example.com/p/hush/n/ns/b/images/o/";
        let url = ParUrl::parse(&format!("{text}\n")).unwrap();
        assert_eq!((&*url.endpoint, &*url.bucket), ("https://os.example.com", "images"));
        assert_eq!(url.object, None);
        assert_eq!(url.target("a%20b"), "/p/hush/n/ns/b/images/o/a%20b");
        assert_eq!(format!("{url:?}"), "ParUrl(https://os.example.com/images)");
        assert_eq!(url.without_token("no hush, no /p/other/n"), "no …, no /p/…/n");
        assert_eq!(url.without_token("ends in /p/other"), "ends in /p/…/");
        let object = ParUrl::parse(&format!("{text}vm/disk%201")).unwrap().object;
        assert_eq!(object.as_deref(), Some("vm/disk 1"));
    }

    #[test]
    fn other_texts_are_none() {
        for text in [
            "",
            "hush",
            "https://os.example.com/p/hush/n/ns/b/images",
            "https://os.example.com/p//n/ns/b/images/o/",
            "https://os.example.com/n/ns/b/images/o/x",
            "https://os.example.com/p/hush/n/ns/b/images/u/",
            "https://a:b@os.example.com/p/hush/n/ns/b/images/o/",
            "https://os.example.com/p/hush/n/ns/b/images/o/?x=y",
            "ftp://os.example.com/p/hush/n/ns/b/images/o/",
            "https://os.example.com/p/hush/n/ns/b/images/o/%ff",
        ] {
            assert_eq!(ParUrl::parse(text).unwrap_err(), NoPar, "{text}");
        }
    }
}
