//! Removing what dead uploads and deletions left in a bucket.

use std::collections::BTreeSet;

use super::{Bucket, store::Store};
use crate::{
    error::Result,
    model::ImageId,
    store::form::{MANIFEST, TOMBSTONE},
};

/// Removes what this daemon's dead uploads left, but for those of `keep`, and finishes deletions that
/// any host began. Other hosts' uploads are left alone, whatever their age.
/// Answers how many uploads there were.
pub async fn sweep(store: &Store, keep: &[ImageId]) -> Result<usize> {
    let claims = store.layout.claims(&store.owner.host_id);
    let mut swept = 0;
    for claim in store.keys(&claims).await? {
        let id = claim.strip_prefix(&claims).and_then(|id| id.parse::<ImageId>().ok());
        let Some(id) = id else { continue };
        if keep.contains(&id) || store.living().contains(&id) {
            continue;
        }
        // With a manifest it is an image, and only the claim is too many.
        if store.brief.head(&store.layout.manifest(&id)).await?.is_none() {
            for (key, upload) in store.brief.uploads(&store.layout.image(&id)).await? {
                store.brief.abort(&key, &upload).await?;
            }
            let _ = store.clear(&id).await?;
            swept += 1;
        }
        let _ = store.brief.delete(&claim).await?;
    }
    finish_deletions(store).await?;
    Ok(swept)
}

async fn finish_deletions(store: &Store) -> Result<()> {
    let keys = store.keys(&store.layout.images()).await?;
    let named = |wanted: &str| -> BTreeSet<ImageId> {
        let files = keys.iter().filter_map(|key| store.layout.parse(key));
        files.filter(|(_, file)| *file == wanted).map(|(id, _)| id).collect()
    };
    for id in named(TOMBSTONE).difference(&named(MANIFEST)) {
        tracing::info!(%id, store = store.name, "finishing a deletion");
        let _ = store.clear(id).await?;
    }
    Ok(())
}
