//! Removing what dead uploads and deletions left in a bucket.

use std::collections::BTreeSet;

use super::{Bucket, Removal, store::Store};
use crate::{
    error::{Error, Reason, Result},
    model::ImageId,
    store::form::{MANIFEST, TOMBSTONE},
};

/// Removes what this daemon's dead uploads left, but for those of `keep`, and
/// finishes deletions that any host began. Other hosts' uploads are left alone, whatever their age.
/// What the bucket refuses to remove stays, and keeps nobody from using it.
/// Answers how many uploads there were.
pub async fn sweep(store: &Store, keep: &[ImageId]) -> Result<usize> {
    if store.brief.removal() == Removal::Impossible {
        return Ok(0);
    }
    let claims = store.layout.claims(&store.owner.host_id);
    let mut swept = 0;
    for claim in store.keys(&claims).await? {
        let id = claim.strip_prefix(&claims).and_then(|id| id.parse::<ImageId>().ok());
        let Some(id) = id else { continue };
        if keep.contains(&id) || store.living().contains(&id) {
            continue;
        }
        match removed(store, &id, &claim).await {
            Ok(upload) => swept += usize::from(upload),
            Err(error) => refused(store, &id, error)?,
        }
    }
    finish_deletions(store).await?;
    Ok(swept)
}

/// Removes what the claim on `id` is about, and the claim. Answers whether it
/// was an upload.
async fn removed(store: &Store, id: &ImageId, claim: &str) -> Result<bool> {
    store.abort_uploads(id).await?;
    // With a manifest it is an image, and only the claim is too many.
    let upload = store.brief.head(&store.layout.manifest(id)).await?.is_none();
    if upload {
        let _ = store.clear(id).await?;
    }
    let _ = store.brief.delete(claim).await?;
    Ok(upload)
}

/// Says what stays, unless the bucket did not answer at all.
fn refused(store: &Store, id: &ImageId, error: Error) -> Result<()> {
    match error.reason() {
        Reason::StoreRefused | Reason::StoreDenied => {
            tracing::warn!(store = store.name, %id, ?error, "what is left of it stays");
            Ok(())
        }
        _ => Err(error),
    }
}

async fn finish_deletions(store: &Store) -> Result<()> {
    let keys = store.keys(&store.layout.images()).await?;
    let named = |wanted: &str| -> BTreeSet<ImageId> {
        let files = keys.iter().filter_map(|key| store.layout.parse(key));
        files.filter(|(_, file)| *file == wanted).map(|(id, _)| id).collect()
    };
    for id in named(TOMBSTONE).difference(&named(MANIFEST)) {
        tracing::info!(%id, store = store.name, "finishing a deletion");
        if let Err(error) = store.clear(id).await {
            refused(store, id, error)?;
        }
    }
    Ok(())
}
