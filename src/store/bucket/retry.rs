//! A bucket that is asked again while asking again may help.

use std::{ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::{Instant, sleep};

use super::{
    Bucket, Complete, ETag, Facts, ListedPart, Over, Page, Put, Removal, StoredAs, UploadId,
};
use crate::{
    error::{Error, Reason, Result},
    model::ByteSize,
    port::{BoxFuture, Delete, Part},
    store::Counters,
};

/// First pause: a connection that broke is there again at once.
const FIRST: Duration = Duration::from_millis(200);
/// Longest pause: how late the return of a store is noticed.
const LONGEST: Duration = Duration::from_secs(20);

/// How long a call is repeated for somebody who waits for its answer.
pub const BRIEF: Duration = Duration::from_secs(15);
/// How long one is repeated for an upload: outages of minutes cost nothing but
/// time. Less than the 20 minutes after which work without progress is ended,
/// so that the store's own words end it.
pub const PATIENT: Duration = Duration::from_secs(18 * 60);

/// Asks again when the store does not answer, is busy or has failed, with
/// pauses that double, or as long as it says. Everything else is the caller's
/// to decide. Every call may be repeated: names are written whole, parts by
/// their number.
#[derive(Debug, Clone)]
pub struct Retry {
    bucket: Arc<dyn Bucket>,
    patience: Duration,
    counters: Arc<Counters>,
}

impl Retry {
    /// Repeats for `patience`, and counts how often.
    #[must_use]
    pub fn new(bucket: Arc<dyn Bucket>, patience: Duration, counters: Arc<Counters>) -> Self {
        Self { bucket, patience, counters }
    }

    /// Asks once.
    #[must_use]
    pub fn once(&self) -> Self {
        Self { patience: Duration::ZERO, ..self.clone() }
    }

    async fn again<'a, T>(&'a self, call: impl Fn() -> BoxFuture<'a, Result<T>>) -> Result<T> {
        noting(self.patience, || self.counters.retried(), call).await
    }
}

/// What `call` gives, asked again for `patience`.
pub async fn again<'a, T>(
    patience: Duration,
    call: impl Fn() -> BoxFuture<'a, Result<T>>,
) -> Result<T> {
    noting(patience, || (), call).await
}

/// The same; `retried` notes that it is asked again.
async fn noting<'a, T>(
    patience: Duration,
    retried: impl Fn(),
    call: impl Fn() -> BoxFuture<'a, Result<T>>,
) -> Result<T> {
    let begin = Instant::now();
    let (mut pause, mut tries) = (FIRST, 1);
    loop {
        let error = match call().await {
            Err(error) if error.reason() == Reason::StoreUnavailable => error,
            other => return other,
        };
        let wait = error.pause().unwrap_or(jittered(pause)).min(patience);
        if begin.elapsed() + wait > patience {
            return Err(given_up(error, begin.elapsed(), tries));
        }
        // The first cause: those that follow may only be its consequences.
        if tries == 1 {
            tracing::warn!("{error:?}; asking again");
        }
        retried();
        sleep(wait).await;
        (pause, tries) = (LONGEST.min(pause * 2), tries + 1);
    }
}

fn given_up(error: Error, after: Duration, tries: u32) -> Error {
    let seconds = after.as_secs();
    let context = format!("the store was asked {tries} times in {seconds} s, in vain");
    let advice = error.advice_text().unwrap_or(
        "look whether the service runs and whether this host reaches it, then ask again",
    );
    let advice = advice.to_owned();
    Error::new(error.reason(), context).because(error).advice(advice)
}

/// Between half of `pause` and all of it: who was refused together does not
/// come back together.
fn jittered(pause: Duration) -> Duration {
    // Without chance they do, which does no harm.
    let mut byte = [0];
    let _ = getrandom::fill(&mut byte);
    pause / 2 + pause / 2 * u32::from(byte[0]) / 256
}

impl Bucket for Retry {
    fn kind(&self) -> &'static str {
        self.bucket.kind()
    }

    fn location(&self) -> String {
        self.bucket.location()
    }

    fn removal(&self) -> Removal {
        self.bucket.removal()
    }

    fn get<'a>(&'a self, key: &'a str, limit: ByteSize) -> BoxFuture<'a, Result<Option<Bytes>>> {
        Box::pin(self.again(move || self.bucket.get(key, limit)))
    }

    fn read<'a>(
        &'a self,
        key: &'a str,
        etag: &'a ETag,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes>> {
        Box::pin(self.again(move || self.bucket.read(key, etag, range.clone())))
    }

    fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Facts>>> {
        Box::pin(self.again(move || self.bucket.head(key)))
    }

    fn put<'a>(&'a self, key: &'a str, bytes: Bytes, over: Over) -> BoxFuture<'a, Result<Put>> {
        Box::pin(self.again(move || self.bucket.put(key, bytes.clone(), over)))
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Delete>> {
        Box::pin(self.again(move || self.bucket.delete(key)))
    }

    fn list<'a>(&'a self, prefix: &'a str, page: Option<&'a str>) -> BoxFuture<'a, Result<Page>> {
        Box::pin(self.again(move || self.bucket.list(prefix, page)))
    }

    fn begin<'a>(&'a self, key: &'a str, mark: &'a str) -> BoxFuture<'a, Result<UploadId>> {
        Box::pin(self.again(move || self.bucket.begin(key, mark)))
    }

    fn put_part<'a>(
        &'a self,
        key: &'a str,
        upload: &'a UploadId,
        part: Arc<Part>,
    ) -> BoxFuture<'a, Result<ETag>> {
        Box::pin(self.again(move || self.bucket.put_part(key, upload, Arc::clone(&part))))
    }

    fn parts<'a>(
        &'a self,
        key: &'a str,
        upload: &'a UploadId,
    ) -> BoxFuture<'a, Result<Vec<ListedPart>>> {
        Box::pin(self.again(move || self.bucket.parts(key, upload)))
    }

    fn complete<'a>(
        &'a self,
        key: &'a str,
        upload: &'a UploadId,
        parts: &'a [StoredAs],
    ) -> BoxFuture<'a, Result<Complete>> {
        Box::pin(self.again(move || self.bucket.complete(key, upload, parts)))
    }

    fn abort<'a>(&'a self, key: &'a str, upload: &'a UploadId) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.again(move || self.bucket.abort(key, upload)))
    }

    fn uploads<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<(String, UploadId)>>> {
        Box::pin(self.again(move || self.bucket.uploads(prefix)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unavailable() -> Error {
        Error::new(Reason::StoreUnavailable, "connection refused")
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_of_ten_minutes_is_waited_for_and_its_end_is_noticed_soon() {
        let begin = Instant::now();
        let back = Duration::from_secs(600);
        let call = || -> BoxFuture<'_, Result<Duration>> {
            Box::pin(async {
                match begin.elapsed() < back {
                    true => Err(unavailable()),
                    false => Ok(begin.elapsed()),
                }
            })
        };
        let noticed = again(PATIENT, call).await.unwrap();
        assert!(noticed < back + LONGEST, "{noticed:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_never_comes_back_is_given_up_with_its_cause() {
        let begin = Instant::now();
        let call = || -> BoxFuture<'_, Result<()>> { Box::pin(async { Err(unavailable()) }) };
        let report = again(BRIEF, call).await.unwrap_err().report();
        assert!(begin.elapsed() <= BRIEF);
        assert!(
            report.contains("0: connection refused\n  help: look whether the service"),
            "{report}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_service_that_says_when_is_asked_then_and_one_that_says_no_is_not() {
        let begin = Instant::now();
        let call = || -> BoxFuture<'_, Result<()>> {
            Box::pin(async {
                match begin.elapsed().as_secs() {
                    0 => Err(unavailable().retry_after(Duration::from_secs(7))),
                    _ => Err(Error::new(Reason::StoreDenied, "no")),
                }
            })
        };
        assert_eq!(again(BRIEF, call).await.unwrap_err().to_string(), "no");
        assert_eq!(begin.elapsed(), Duration::from_secs(7));
    }
}
