//! An object at a URL that somebody gave with an order, and that is not kept.
//!
//! ```text
//! begin ─► what aborts the upload, into the vault ─► parts ─► complete ─► wiped
//!                                                      └────► abort ────► wiped
//! ```
//! The URL of the upload, which the service gives, ends with it: what is kept
//! is of no use to anyone then.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use reqwest::Url;
use tokio::sync::OnceCell;

use super::{ObjectPar, ParUrl, remains::Remains};
use crate::{
    error::{Context, Error, Reason, Result},
    model::upload::UploadToken,
    port::{BoxFuture, Delivery, Outlet, Outlets, Over, Part, Secret, Vault},
    steps,
    store::bucket::{BRIEF, ETag, PATIENT, StoredAs, UploadId, again, exists},
};

/// Finds the objects of pre-authenticated requests.
#[derive(Debug)]
pub struct ParOutlets {
    mark: String,
    vault: Arc<dyn Vault>,
}

impl ParOutlets {
    /// Objects will carry `mark`; what aborts their uploads after a crash is
    /// in `vault`, which is theirs alone.
    #[must_use]
    pub fn new(mark: String, vault: Arc<dyn Vault>) -> Self {
        Self { mark, vault }
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
        let (mark, vault) = (self.mark.clone(), Arc::clone(&self.vault));
        Ok(Box::new(ParOutlet { url, over, location, mark, vault }))
    }

    fn abandon<'a>(&'a self, token: &'a UploadToken) -> BoxFuture<'a, Result<()>> {
        Box::pin(async {
            // It is wiped before the end of the delivery, by which it was
            // done, is in the journal.
            let Some(secret) = self.vault.open(&token.0).await? else { return Ok(()) };
            let remains = Remains::try_from(&secret)?;
            let abort = || -> BoxFuture<'_, Result<()>> { Box::pin(remains.abort()) };
            steps::effect("url abort", again(BRIEF, abort)).await
        })
    }

    fn sweep<'a>(&'a self, keep: &'a [UploadToken]) -> BoxFuture<'a, Result<usize>> {
        Box::pin(async {
            let keep: Vec<_> = keep.iter().map(|token| &*token.0).collect();
            self.vault.sweep(&keep).await
        })
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
    vault: Arc<dyn Vault>,
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
            let begun = steps::effect("url begin", again(PATIENT, begin)).await?;
            let Some(upload) = begun else { return Err(exists(&self.location)) };
            let (location, over) = (self.location.clone(), self.over);
            let (vault, kept) = (Arc::clone(&self.vault), OnceCell::new());
            let parts = Mutex::default();
            let delivery = ParDelivery { par, upload, over, location, parts, vault, kept };
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
    vault: Arc<dyn Vault>,
    /// What the vault calls that which aborts it.
    kept: OnceCell<String>,
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

    async fn complete(&self) -> Result<Option<ETag>> {
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
        again(PATIENT, complete).await
    }

    /// The delivery has ended, one way or the other.
    async fn wipe(&self) {
        let Some(kept) = self.kept.get() else { return };
        if let Err(error) = self.vault.wipe(kept).await {
            tracing::warn!("{error:?}; the next start does that");
        }
    }
}

impl Delivery for ParDelivery {
    fn token(&self) -> BoxFuture<'_, Result<UploadToken>> {
        Box::pin(async {
            let keep = async || {
                let secret = Secret::try_from(&self.par.remains(&self.upload)?)?;
                self.vault.keep(&secret).await
            };
            self.kept.get_or_try_init(keep).await.cloned().map(UploadToken)
        })
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
            let etag = steps::effect("url complete", ParDelivery::complete(self)).await?;
            self.wipe().await;
            Ok(etag.map(|ETag(etag)| etag).filter(|etag| !etag.is_empty()))
        })
    }

    fn abort(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            steps::effect("url abort", self.par.abort(&self.upload)).await?;
            self.wipe().await;
            Ok(())
        })
    }
}

impl fmt::Debug for ParDelivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ParDelivery({})", self.location)
    }
}
