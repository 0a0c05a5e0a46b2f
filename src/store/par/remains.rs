//! What is left of an upload whose imaged has died, and what aborts it.

use serde::{Deserialize, Serialize};

use super::{ParUrl, access::Access};
use crate::{
    error::{Context, Error, Reason, Result},
    port::Secret,
    store::http::Http,
};

/// An upload that was begun. It gives access to that alone, unlike the URL
/// that it was begun by.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Remains {
    pub endpoint: String,
    pub bucket: String,
    pub object: String,
    /// A secret.
    pub path: String,
}

impl Remains {
    /// Forgets the upload. Aborting what is not there is success.
    pub async fn abort(&self) -> Result<()> {
        let Self { endpoint, bucket, object, path } = self.clone();
        let what = format!("abort the upload of {object}");
        let url = ParUrl::of_upload(endpoint, bucket, object, path.clone());
        // Reads the authorities that are trusted.
        let access = tokio::task::spawn_blocking(move || {
            Http::new(&url.endpoint, None).map(|http| Access::new(http, url))
        });
        let access =
            access.await.context(Reason::Internal, || "the way to the upload cannot be made")??;
        access.abort_at(path, &what).await
    }
}

impl TryFrom<&Remains> for Secret {
    type Error = Error;

    fn try_from(remains: &Remains) -> Result<Self> {
        let text = serde_json::to_string(remains)
            .context(Reason::Internal, || "what aborts an upload has no JSON")?;
        Ok(Self(text))
    }
}

impl TryFrom<&Secret> for Remains {
    type Error = Error;

    fn try_from(secret: &Secret) -> Result<Self> {
        // The cause could tell of what is in it.
        serde_json::from_str(&secret.0).map_err(|_| {
            Error::new(Reason::JournalFailed, "what aborts an upload was kept in odd words")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_understood_and_anything_else_is_not_repeated() {
        let remains = Remains {
            endpoint: "https://os.example.com".into(),
            bucket: "images".into(),
            object: "out/disk 1".into(),
            path: "/p/hush/n/ns/b/images/u/out%2Fdisk%201/id/7/".into(),
        };
        let secret = Secret::try_from(&remains).unwrap();
        assert!(Remains::try_from(&secret).unwrap() == remains);
        for odd in ["hush", "{\"endpoint\": \"hush\"}", "[\"hush\"]", "\"hush\""] {
            let Err(error) = Remains::try_from(&Secret(odd.into())) else { panic!("{odd}") };
            assert!(!format!("{error:?}").contains("hush"), "{error:?}");
        }
    }

    #[tokio::test]
    async fn who_cannot_be_reached_is_named_without_the_secret() {
        let remains = Remains {
            endpoint: "http://127.0.0.1:1".into(),
            bucket: "images".into(),
            object: "disk".into(),
            path: "/p/hush/n/ns/b/images/u/disk/id/7/".into(),
        };
        let error = remains.abort().await.unwrap_err();
        assert_eq!(error.reason(), Reason::StoreUnavailable);
        let said = format!("{error:?}");
        assert!(said.contains("127.0.0.1:1") && !said.contains("hush"), "{said}");
    }
}
