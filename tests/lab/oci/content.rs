//! Bodies on disk: receiving them chunk by chunk with their checksums, and serving ranges of them.

use super::encode::base64;
use super::http::{Failure, Upload};
use aws_lc_rs::digest::{Context as Sha, SHA256, SHA384};
use bytes::Bytes;
use crc_fast::CrcAlgorithm::Crc32Iscsi;
use hyper::HeaderMap;
use hyper::body::{Body, Frame, SizeHint};
use md5::{Digest, Md5};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

const READ_SIZE: u64 = 256 * 1024;

/// A file of the store. It is removed with the last reference to it, so that replaced parts and
/// deleted objects free their space, though not under a reader.
#[derive(Debug)]
pub(super) struct Blob {
    pub path: PathBuf,
    pub len: u64,
}

impl Blob {
    /// Makes all of it a hole.
    pub fn forget(&self) {
        let file = File::options().write(true).open(&self.path).unwrap();
        file.set_len(0).unwrap();
        file.set_len(self.len).unwrap();
    }
}

impl Drop for Blob {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// The checksum a client may ask for besides MD5.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Algorithm {
    Crc32c,
    Sha256,
    Sha384,
}

impl Algorithm {
    pub fn from_headers(headers: &HeaderMap) -> Result<Option<Algorithm>, Failure> {
        let Some(value) = headers.get("opc-checksum-algorithm") else { return Ok(None) };
        match value.to_str().unwrap_or("").to_ascii_uppercase().as_str() {
            "CRC32C" => Ok(Some(Algorithm::Crc32c)),
            "SHA256" => Ok(Some(Algorithm::Sha256)),
            "SHA384" => Ok(Some(Algorithm::Sha384)),
            _ => Err(Failure::invalid("The opc-checksum-algorithm header is not valid")),
        }
    }

    /// The name in header names.
    pub fn name(self) -> &'static str {
        match self {
            Algorithm::Crc32c => "crc32c",
            Algorithm::Sha256 => "sha256",
            Algorithm::Sha384 => "sha384",
        }
    }

    /// The checksum of a whole made of parts, in the form of the header's value, and the header.
    pub fn combine(self, parts: &[(&[u8], u64)]) -> (String, String) {
        if self == Algorithm::Crc32c {
            let crc = |bytes: &[u8]| u64::from(u32::from_be_bytes(bytes.try_into().unwrap()));
            let whole = parts.iter().fold(0, |sum, (part, len)| {
                crc_fast::checksum_combine(Crc32Iscsi, sum, crc(part), *len)
            });
            return ("opc-content-crc32c".into(), base64(&(whole as u32).to_be_bytes()));
        }
        let algorithm = if self == Algorithm::Sha256 { &SHA256 } else { &SHA384 };
        let mut whole = Sha::new(algorithm);
        parts.iter().for_each(|(part, _)| whole.update(part));
        let value = format!("{}-{}", base64(whole.finish().as_ref()), parts.len());
        (format!("opc-multipart-{}", self.name()), value)
    }
}

/// A body that has arrived in full.
#[derive(Clone, Debug)]
pub(super) struct Received {
    pub blob: Arc<Blob>,
    pub md5: [u8; 16],
    /// The checksum asked for, in raw bytes.
    pub extra: Option<(Algorithm, Vec<u8>)>,
}

impl Received {
    /// The checksum headers of this body taken alone, the MD5 under the name given.
    pub fn checksum_headers(&self, md5_header: &str) -> Vec<(String, String)> {
        let mut headers = vec![(md5_header.to_string(), base64(&self.md5))];
        if let Some((algorithm, sum)) = &self.extra {
            headers.push((format!("opc-content-{}", algorithm.name()), base64(sum)));
        }
        headers
    }
}

/// Writes the request's body to the path, then compares it with every checksum the headers name.
pub(super) async fn receive(
    upload: &mut Upload,
    path: PathBuf,
    headers: &HeaderMap,
    wanted: Option<Algorithm>,
    signed_hash: Option<&str>,
) -> Result<Received, Failure> {
    let header = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or(""));
    let declared: Vec<Algorithm> = [Algorithm::Crc32c, Algorithm::Sha256, Algorithm::Sha384]
        .into_iter()
        .filter(|algorithm| header(&format!("opc-content-{}", algorithm.name())).is_some())
        .collect();
    let needed = |algorithm| wanted == Some(algorithm) || declared.contains(&algorithm);
    let mut file = File::create_new(&path).unwrap();
    // Made before the body is read: a request given up half-way must not leave its file behind.
    let mut blob = Blob { path, len: 0 };
    let mut md5 = Md5::new();
    let mut crc = needed(Algorithm::Crc32c).then(|| crc_fast::Digest::new(Crc32Iscsi));
    let sign_needs = signed_hash.is_some();
    let mut sha256 = (needed(Algorithm::Sha256) || sign_needs).then(|| Sha::new(&SHA256));
    let mut sha384 = needed(Algorithm::Sha384).then(|| Sha::new(&SHA384));
    while let Some(chunk) = upload.chunk().await? {
        // Written on the spot: these are copies into the page cache.
        file.write_all(&chunk).unwrap();
        blob.len += chunk.len() as u64;
        md5.update(&chunk);
        crc.iter_mut().for_each(|digest| digest.update(&chunk));
        sha256.iter_mut().for_each(|digest| digest.update(&chunk));
        sha384.iter_mut().for_each(|digest| digest.update(&chunk));
    }
    let md5: [u8; 16] = md5.finalize().into();
    let sums = [
        crc.map(|digest| (Algorithm::Crc32c, (digest.finalize() as u32).to_be_bytes().to_vec())),
        sha256.map(|digest| (Algorithm::Sha256, digest.finish().as_ref().to_vec())),
        sha384.map(|digest| (Algorithm::Sha384, digest.finish().as_ref().to_vec())),
    ];

    if let (Some(signed), Some((_, sum))) = (signed_hash, &sums[1])
        && signed != base64(sum)
    {
        return Err(super::sign::body_mismatch());
    }
    compare("MD5", "Content-MD5", header("content-md5"), &md5)?;
    for (algorithm, sum) in sums.iter().flatten() {
        let name = format!("opc-content-{}", algorithm.name());
        compare(&algorithm.name().to_uppercase(), &name, header(&name), sum)?;
    }
    let keep = wanted.or(declared.first().copied());
    let extra = sums.into_iter().flatten().find(|(algorithm, _)| Some(*algorithm) == keep);
    Ok(Received { blob: Arc::new(blob), md5, extra })
}

fn compare(kind: &str, name: &str, declared: Option<&str>, sum: &[u8]) -> Result<(), Failure> {
    let (Some(declared), actual) = (declared, base64(sum)) else { return Ok(()) };
    if declared == actual {
        return Ok(());
    }
    let message = format!(
        "The computed {kind} of the request body ({actual}) does not match the {name} header \
         ({declared})"
    );
    Err(Failure::new(400, format!("UnmatchedContent{kind}"), message))
}

/// `opc-multipart-md5`: the MD5 of the parts' MD5s, a dash, and how many they are.
pub(super) fn multipart_md5(parts: &[[u8; 16]]) -> String {
    format!("{}-{}", base64(&Md5::digest(parts.concat())), parts.len())
}

/// Reads a whole object, for tests.
pub(super) fn read_all(blobs: &[Arc<Blob>]) -> Vec<u8> {
    blobs.iter().flat_map(|blob| fs::read(&blob.path).unwrap()).collect()
}

/// A response body: bytes at hand, or a range of an object read from its files as it goes out.
pub(super) enum Payload {
    Bytes(Option<Bytes>),
    Files { files: VecDeque<(Arc<Blob>, Range<u64>)>, open: Option<File> },
}

impl Payload {
    pub fn empty() -> Payload {
        Payload::Bytes(None)
    }

    pub fn text(text: String) -> Payload {
        Payload::Bytes((!text.is_empty()).then(|| text.into()))
    }

    /// The given range of the files laid end to end.
    pub fn range(blobs: &[Arc<Blob>], range: Range<u64>) -> Payload {
        let mut files = VecDeque::new();
        let mut offset = 0;
        for blob in blobs {
            let start = range.start.saturating_sub(offset).min(blob.len);
            let end = range.end.saturating_sub(offset).min(blob.len);
            offset += blob.len;
            if start < end {
                files.push_back((blob.clone(), start..end));
            }
        }
        Payload::Files { files, open: None }
    }

    fn remaining(&self) -> u64 {
        match self {
            Payload::Bytes(bytes) => bytes.as_ref().map_or(0, |bytes| bytes.len() as u64),
            Payload::Files { files, .. } => files.iter().map(|(_, r)| r.end - r.start).sum(),
        }
    }
}

impl Body for Payload {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let chunk = match self.get_mut() {
            Payload::Bytes(bytes) => bytes.take(),
            Payload::Files { files, open } => next_chunk(files, open),
        };
        Poll::Ready(chunk.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.remaining() == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.remaining())
    }
}

fn next_chunk(
    files: &mut VecDeque<(Arc<Blob>, Range<u64>)>,
    open: &mut Option<File>,
) -> Option<Bytes> {
    let (blob, range) = files.front_mut()?;
    let file = open.get_or_insert_with(|| {
        let mut file = File::open(&blob.path).unwrap();
        file.seek(SeekFrom::Start(range.start)).unwrap();
        file
    });
    let size = READ_SIZE.min(range.end - range.start);
    let mut chunk = Vec::with_capacity(size as usize);
    file.take(size).read_to_end(&mut chunk).unwrap();
    range.start += size;
    if range.is_empty() {
        files.pop_front();
        *open = None;
    }
    Some(chunk.into())
}
