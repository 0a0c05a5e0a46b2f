//! An object at a URL that somebody gave with an order, and that is not kept.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use reqwest::Url;

use super::{ObjectPar, ParUrl};
use crate::{
    error::{Context, Error, Reason, Result},
    model::upload::UploadToken,
    port::{BoxFuture, Delivery, Outlet, Outlets, Over, Part, Secret},
    store::bucket::{ETag, PATIENT, StoredAs, UploadId, again, exists},
};

/// Finds the objects of pre-authenticated requests.
#[derive(Debug)]
pub struct ParOutlets {
    mark: String,
}

impl ParOutlets {
    /// Objects will carry `mark`.
    #[must_use]
    pub fn new(mark: String) -> Self {
        Self { mark }
    }
}

impl Outlets for ParOutlets {
    fn by_uri(&self, uri: &Secret, over: Over) -> Result<Box<dyn Outlet>> {
        let wrong = |why: &str| {
            Error::new(Reason::InvalidParameter, format!("the URI {why}")).field("uri").advice(
                "make a pre-authenticated request for one object, with --access-type ObjectWrite, \
                 and give its whole URL",
            )
        };
        let url = ParUrl::parse(&uri.0)
            .map_err(|_| wrong("is not https://HOST/p/TOKEN/n/NAMESPACE/b/BUCKET/o/OBJECT"))?;
        if !is_private(&url.endpoint) {
            return Err(wrong("is no https one: its secret would be seen on the way"));
        }
        let Some(object) = url.object.clone() else {
            return Err(wrong("names no object").advice(
                "add the object's name to it, or make a pre-authenticated request for one object",
            ));
        };
        let location = format!("{}/{}/{object}", url.endpoint, url.bucket);
        Ok(Box::new(ParOutlet { url, over, location, mark: self.mark.clone() }))
    }
}

/// Whether nobody on the way sees what is sent.
fn is_private(endpoint: &str) -> bool {
    Url::parse(endpoint).is_ok_and(|url| {
        let local = url.host_str().is_some_and(|host| {
            let host = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
            host.is_ok_and(|host| host.is_loopback())
        });
        url.scheme() == "https" || local
    })
}

/// The place of an object.
struct ParOutlet {
    url: ParUrl,
    over: Over,
    location: String,
    mark: String,
}

impl Outlet for ParOutlet {
    fn location(&self) -> String {
        self.location.clone()
    }

    fn begin(&self) -> BoxFuture<'_, Result<Box<dyn Delivery>>> {
        Box::pin(async {
            let url = self.url.clone();
            // Reads the authorities that are trusted.
            let par = tokio::task::spawn_blocking(move || ObjectPar::new(url, None))
                .await
                .context(Reason::Internal, || "the way to the object cannot be made")??;
            let begin = || -> BoxFuture<'_, Result<Option<UploadId>>> {
                Box::pin(async {
                    match self.over {
                        Over::Nothing => par.begin_new(&self.mark).await,
                        Over::Anything => par.begin(&self.mark).await.map(Some),
                    }
                })
            };
            let Some(upload) = again(PATIENT, begin).await? else {
                return Err(exists(&self.location));
            };
            let (location, over) = (self.location.clone(), self.over);
            let delivery = ParDelivery { par, upload, over, location, parts: Mutex::default() };
            Ok(Box::new(delivery) as Box<dyn Delivery>)
        })
    }
}

impl fmt::Debug for ParOutlet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ParOutlet({})", self.location)
    }
}

/// An object on its way.
struct ParDelivery {
    par: ObjectPar,
    upload: UploadId,
    over: Over,
    location: String,
    parts: Mutex<BTreeMap<u32, StoredAs>>,
}

impl ParDelivery {
    /// Whether a completion of which the service knows nothing was done by an
    /// earlier try, whose answer was lost.
    async fn done_before(&self, parts: &[StoredAs], lost: Error) -> Result<Option<ETag>> {
        match self.par.made_of(parts).await {
            Ok(Some(etag)) => return Ok(Some(etag)),
            Ok(None) => return Err(lost),
            Err(error) if error.reason() == Reason::StoreDenied => {}
            Err(error) => return Err(error),
        }
        // Who may only write can find out whether there is one now.
        match self.par.begin_new("").await? {
            None if self.over == Over::Nothing => Ok(None),
            None => Err(lost),
            Some(new) => {
                self.par.abort(&new).await?;
                Err(lost)
            }
        }
    }
}

impl Delivery for ParDelivery {
    /// Only the URL could abort it.
    fn token(&self) -> Option<UploadToken> {
        None
    }

    fn put(&self, part: Arc<Part>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let put = || -> BoxFuture<'_, Result<ETag>> {
                Box::pin(self.par.put_part(&self.upload, Arc::clone(&part)))
            };
            let etag = again(PATIENT, put).await?;
            let stored = StoredAs { number: part.number, etag, sha256: part.sha256 };
            let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
            parts.insert(part.number, stored);
            Ok(())
        })
    }

    fn complete(&self) -> BoxFuture<'_, Result<Option<String>>> {
        Box::pin(async {
            let parts: Vec<_> = {
                let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
                parts.values().cloned().collect()
            };
            let complete = || -> BoxFuture<'_, Result<Option<ETag>>> {
                Box::pin(async {
                    match self.par.complete(&self.upload, &parts).await {
                        Err(error) if error.reason() == Reason::StoreRefused => {
                            self.done_before(&parts, error).await
                        }
                        completed => completed.map(Some),
                    }
                })
            };
            let etag = again(PATIENT, complete).await?;
            Ok(etag.map(|ETag(etag)| etag).filter(|etag| !etag.is_empty()))
        })
    }

    fn abort(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.par.abort(&self.upload))
    }
}

impl fmt::Debug for ParDelivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ParDelivery({})", self.location)
    }
}
