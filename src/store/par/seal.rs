//! Seals the URL of an upload for the journal: whoever has the journal and
//! not the pre-authenticated request learns nothing from it.

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use base64::{Engine, engine::general_purpose::STANDARD};

use crate::error::{Context, Error, Reason, Result};

/// What the key is for, so that it is no other's.
const PURPOSE: &str = "imaged 2026 upload by a pre-authenticated request";

/// `text`, readable again with the same `secret` alone.
pub fn seal(secret: &str, text: &str) -> Result<String> {
    let mut bytes = text.as_bytes().to_vec();
    let sealed = key(secret)
        .and_then(|key| key.seal_in_place_append_tag(Aad::empty(), &mut bytes))
        .context(Reason::Internal, || "the URL of an upload cannot be sealed")?;
    Ok(STANDARD.encode([&sealed.as_ref()[..], &bytes].concat()))
}

/// What was sealed with `secret`.
///
/// # Errors
///
/// `STORE_DENIED`: it was another.
pub fn open(secret: &str, sealed: &str) -> Result<String> {
    let opened = || {
        let bytes = STANDARD.decode(sealed).ok()?;
        let (nonce, sealed) = bytes.split_first_chunk::<NONCE_LEN>()?;
        let mut sealed = sealed.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let opened = key(secret).ok()?.open_in_place(nonce, Aad::empty(), &mut sealed).ok()?;
        String::from_utf8(opened.to_vec()).ok()
    };
    opened().ok_or_else(|| {
        let context = "the upload was begun by another pre-authenticated request";
        Error::new(Reason::StoreDenied, context).advice("make the image again")
    })
}

fn key(secret: &str) -> std::result::Result<RandomizedNonceKey, aws_lc_rs::error::Unspecified> {
    RandomizedNonceKey::new(&AES_256_GCM, &blake3::derive_key(PURPOSE, secret.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_secret_opens_it() {
        let sealed = seal("token", "/p/other/n/ns/b/bucket/u/object/id/7/").unwrap();
        assert!(!sealed.contains("other"));
        assert_ne!(sealed, seal("token", "/p/other/n/ns/b/bucket/u/object/id/7/").unwrap());
        assert_eq!(open("token", &sealed).unwrap(), "/p/other/n/ns/b/bucket/u/object/id/7/");
        for (secret, text) in [("taken", &*sealed), ("token", ""), ("token", "AAAA")] {
            assert_eq!(open(secret, text).unwrap_err().reason(), Reason::StoreDenied);
        }
    }
}
