//! Any store, counted: what went there, what came back, and what went wrong.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    error::{Reason, Result},
    model::{
        ByteSize, ImageId,
        host::{Space, Traffic},
        image::{Manifest, Record},
        upload::{KeptPart, Receipt, UploadToken},
    },
    port::{
        BoxFuture, Delete, Delivery, ObjectReader, ObjectStore, Outlet, Over, Part, ReadAt, Sealed,
        Upload,
    },
    steps,
};

/// Counts for one store, from the daemon's start on.
#[derive(Debug, Default)]
pub struct Counters {
    stored: AtomicU64,
    read: AtomicU64,
    failed: AtomicU64,
    retried: AtomicU64,
}

impl Counters {
    /// A request was refused or not answered, and is made again.
    pub(super) fn retried(&self) {
        self.retried.fetch_add(1, Ordering::Relaxed);
    }

    fn stored(&self, part: &Part) {
        self.stored.fetch_add(part.size.get(), Ordering::Relaxed);
    }

    /// `outcome` as it is, counted if the store failed. What was called off,
    /// did not.
    fn counted<T>(&self, outcome: Result<T>) -> Result<T> {
        if outcome.as_ref().is_err_and(|error| error.reason() != Reason::Canceled) {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        outcome
    }

    /// The same of what changes the store.
    async fn effect<T>(&self, name: &str, deed: BoxFuture<'_, Result<T>>) -> Result<T> {
        self.counted(steps::effect(name, deed).await)
    }

    fn traffic(&self) -> Traffic {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Traffic {
            stored: ByteSize(count(&self.stored)),
            read: ByteSize(count(&self.read)),
            failed: count(&self.failed),
            retried: count(&self.retried),
        }
    }
}

/// A store, or something of one, and where it is counted.
#[derive(Debug)]
pub struct Metered<T> {
    inner: T,
    counters: Arc<Counters>,
}

impl<T> Metered<T> {
    /// Counts what `inner` does.
    pub fn new(inner: T, counters: Arc<Counters>) -> Self {
        Self { inner, counters }
    }

    /// Something that `inner` gave.
    fn with<U>(&self, inner: U) -> Metered<U> {
        Metered::new(inner, Arc::clone(&self.counters))
    }
}

impl<S: ObjectStore> ObjectStore for Metered<S> {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn kind(&self) -> &'static str {
        self.inner.kind()
    }

    fn location(&self) -> String {
        self.inner.location()
    }

    fn traffic(&self) -> Traffic {
        self.counters.traffic()
    }

    /// Not counted: it is asked whenever somebody looks.
    fn space(&self) -> BoxFuture<'_, Result<Option<Space>>> {
        self.inner.space()
    }

    fn begin<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Box<dyn Upload>>> {
        Box::pin(async {
            let upload = self.counters.effect("store begin", self.inner.begin(id)).await?;
            Ok(Box::new(self.with(upload)) as Box<dyn Upload>)
        })
    }

    fn resume<'a>(
        &'a self,
        id: &'a ImageId,
        token: &'a UploadToken,
        parts: Vec<KeptPart>,
    ) -> BoxFuture<'a, Result<Box<dyn Upload>>> {
        Box::pin(async {
            let upload =
                self.counters.effect("store resume", self.inner.resume(id, token, parts)).await?;
            Ok(Box::new(self.with(upload)) as Box<dyn Upload>)
        })
    }

    fn sweep<'a>(&'a self, keep: &'a [ImageId]) -> BoxFuture<'a, Result<usize>> {
        Box::pin(async { self.counters.effect("store sweep", self.inner.sweep(keep)).await })
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<(Manifest, Record)>>> {
        Box::pin(async { self.counters.counted(self.inner.list().await) })
    }

    fn get<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Option<(Manifest, Record)>>> {
        Box::pin(async { self.counters.counted(self.inner.get(id).await) })
    }

    fn open<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Box<dyn ObjectReader>>> {
        Box::pin(async {
            let reader = self.counters.counted(self.inner.open(id).await)?;
            Ok(Box::new(self.with(reader)) as Box<dyn ObjectReader>)
        })
    }

    fn extent_digests<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Vec<u8>>> {
        Box::pin(async { self.counters.counted(self.inner.extent_digests(id).await) })
    }

    fn delete<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Delete>> {
        Box::pin(async { self.counters.effect("store delete", self.inner.delete(id)).await })
    }

    fn outlet<'a>(&'a self, name: &'a str, over: Over) -> BoxFuture<'a, Result<Box<dyn Outlet>>> {
        Box::pin(async move {
            let outlet = self.counters.counted(self.inner.outlet(name, over).await)?;
            Ok(Box::new(self.with(outlet)) as Box<dyn Outlet>)
        })
    }

    fn abandon<'a>(&'a self, token: &'a UploadToken) -> BoxFuture<'a, Result<()>> {
        Box::pin(async { self.counters.effect("store abandon", self.inner.abandon(token)).await })
    }
}

impl Upload for Metered<Box<dyn Upload>> {
    fn token(&self) -> Option<UploadToken> {
        self.inner.token()
    }

    fn put(&self, part: Arc<Part>) -> BoxFuture<'_, Result<Receipt>> {
        Box::pin(async move {
            let put = self.inner.put(Arc::clone(&part));
            let receipt = self.counters.effect("store put", put).await?;
            self.counters.stored(&part);
            Ok(receipt)
        })
    }

    fn seal(&self, sealed: Arc<Sealed>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { self.counters.effect("store seal", self.inner.seal(sealed)).await })
    }

    fn abort(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { self.counters.effect("store abort", self.inner.abort()).await })
    }
}

impl ReadAt for Metered<Box<dyn ObjectReader>> {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let outcome = self.inner.read_at(buf, offset);
        let (counter, count) = match outcome {
            Ok(()) => (&self.counters.read, buf.len() as u64),
            Err(_) => (&self.counters.failed, 1),
        };
        counter.fetch_add(count, Ordering::Relaxed);
        outcome
    }
}

impl ObjectReader for Metered<Box<dyn ObjectReader>> {}

impl Outlet for Metered<Box<dyn Outlet>> {
    fn location(&self) -> String {
        self.inner.location()
    }

    fn begin(&self) -> BoxFuture<'_, Result<Box<dyn Delivery>>> {
        Box::pin(async {
            let delivery = self.counters.counted(self.inner.begin().await)?;
            Ok(Box::new(self.with(delivery)) as Box<dyn Delivery>)
        })
    }
}

impl Delivery for Metered<Box<dyn Delivery>> {
    fn token(&self) -> BoxFuture<'_, Result<UploadToken>> {
        self.inner.token()
    }

    fn put(&self, part: Arc<Part>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.counters.counted(self.inner.put(Arc::clone(&part)).await)?;
            self.counters.stored(&part);
            Ok(())
        })
    }

    fn complete(&self) -> BoxFuture<'_, Result<Option<String>>> {
        Box::pin(async { self.counters.counted(self.inner.complete().await) })
    }

    fn abort(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { self.counters.effect("store abort", self.inner.abort()).await })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::directory::tests::{Bench, id, parts, sealed};

    #[tokio::test]
    async fn what_a_store_took_and_gave_and_failed_is_counted() {
        let (bench, counters) = (Bench::new(), Arc::new(Counters::default()));
        let store = Metered::new(bench.store().await, Arc::clone(&counters));
        let (id, parts) = (id(1), parts(&[8192, 100]));
        assert_eq!(store.traffic(), Traffic::default());

        let upload = store.begin(&id).await.unwrap();
        let sealed = sealed(&id, &parts);
        for part in parts {
            upload.put(part).await.unwrap();
        }
        upload.seal(Arc::new(sealed)).await.unwrap();
        let reader = store.open(&id).await.unwrap();
        for (len, offset, fits) in [(100, 0, true), (8000, 200, true), (200, 8192, false)] {
            assert_eq!(reader.read_at(&mut vec![0; len], offset).is_ok(), fits);
        }
        store.begin(&id).await.map(|_| ()).unwrap_err();
        counters.retried();
        let traffic =
            Traffic { stored: ByteSize(8292), read: ByteSize(8100), failed: 2, retried: 1 };
        assert_eq!(store.traffic(), traffic);
        assert_eq!(store.delete(&id).await.unwrap(), Delete::Deleted);
        assert_eq!(store.traffic(), traffic);
    }
}
