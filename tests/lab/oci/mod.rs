//! A test server that speaks the native API of Oracle Cloud Infrastructure's Object Storage over
//! HTTP/1.1: it verifies every signature, keeps bodies in files, and can be told to fail.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::unreachable)]

mod clock;
mod content;
mod encode;
mod fault;
mod http;
mod keys;
mod multipart;
mod objects;
mod par;
mod sign;
mod store;

// Not every user of the module needs every name.
#[allow(unused_imports)]
pub use fault::{Fault, FaultKind};
#[allow(unused_imports)]
pub use keys::{ApiKey, TrustedKey};
#[allow(unused_imports)]
pub use par::{ParAccess, ParSpec};
pub use store::Versioning;

use content::Blob;
use http::{Call, Failure};
use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;

/// How to start the server.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where parts and objects are kept; made if it is not there.
    pub dir: PathBuf,
    /// The one namespace.
    pub namespace: String,
    /// The keys whose signatures are accepted.
    pub keys: Vec<TrustedKey>,
    /// HTTPS, by a certificate of an authority made for the purpose.
    pub tls: bool,
    /// 0 for any free port.
    pub port: u16,
    /// Milliseconds the server's clock is ahead of the machine's.
    pub clock_offset: i64,
    /// Items in a page of uploads, parts or pre-authenticated requests, if none is asked for.
    pub page_size: usize,
    /// Below it, any part but the last makes the commit fail; OCI is not known to enforce one.
    pub min_part_size: u64,
    /// Whether GET of a pre-authenticated multipart URI lists the parts; OCI documents no such GET.
    pub par_can_list_parts: bool,
    /// Parts read as zeroes once they were checked, and take no room: for uploads that are larger
    /// than the disk.
    pub forgets_parts: bool,
}

impl Options {
    /// Plain HTTP on a free port, the given keys, namespace `testns`, no peculiarities.
    pub fn new(dir: impl Into<PathBuf>, keys: Vec<TrustedKey>) -> Options {
        Options {
            dir: dir.into(),
            namespace: "testns".into(),
            keys,
            tls: false,
            port: 0,
            clock_offset: 0,
            page_size: 1000,
            min_part_size: 0,
            par_can_list_parts: false,
            forgets_parts: false,
        }
    }
}

/// A request the server has seen, without secrets.
#[derive(Clone, Debug, Default)]
pub struct LoggedRequest {
    /// HTTP method.
    pub method: String,
    /// Path and query as sent, the token of a pre-authenticated request masked.
    pub path: String,
    /// The object it names, decoded.
    pub object: Option<String>,
    /// The part it uploads.
    pub part: Option<u32>,
    /// Bytes of the body that arrived.
    pub body_bytes: u64,
    /// Status of the answer; 0 if there was none.
    pub status: u16,
    /// Status the work itself ended with, which a fault may have hidden; 0 if none was done.
    pub executed_status: u16,
    /// The code of an error answer.
    pub code: Option<String>,
}

/// An object as stored.
#[derive(Clone, Debug)]
pub struct ObjectInfo {
    /// Name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// ETag.
    pub etag: String,
    /// Content headers and metadata kept with it, and the checksum headers it is sent with.
    pub headers: BTreeMap<String, String>,
    /// The files whose contents, end to end, are the object.
    pub files: Vec<PathBuf>,
}

/// A part of an upload in progress.
#[derive(Clone, Debug)]
pub struct PartInfo {
    /// Part number.
    pub number: u32,
    /// Bytes.
    pub size: u64,
    /// ETag.
    pub etag: String,
}

/// A multipart upload in progress.
#[derive(Clone, Debug)]
pub struct UploadInfo {
    /// Upload id.
    pub id: String,
    /// Name of the object it is for.
    pub object: String,
    /// Its parts by number.
    pub parts: Vec<PartInfo>,
}

#[derive(Default)]
struct State {
    buckets: BTreeMap<String, store::Bucket>,
    faults: Vec<Fault>,
    log: Vec<LoggedRequest>,
}

/// What all connections share.
struct Shared {
    dir: PathBuf,
    namespace: String,
    keys: Vec<TrustedKey>,
    scheme: &'static str,
    port: u16,
    clock_offset: AtomicI64,
    page_size: usize,
    min_part_size: u64,
    forgets_parts: bool,
    par_can_list_parts: bool,
    state: Mutex<State>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The state, once it is sure that the call's bucket is in it.
    fn bucket(&self, call: &Call) -> Result<MutexGuard<'_, State>, Failure> {
        let state = self.state();
        if call.namespace == self.namespace && state.buckets.contains_key(&call.bucket) {
            return Ok(state);
        }
        Err(Failure::bucket(&call.namespace, &call.bucket))
    }

    fn now(&self) -> i64 {
        clock::now() + self.clock_offset.load(Ordering::Relaxed)
    }

    fn new_blob(&self) -> PathBuf {
        self.dir.join(format!("{}.blob", encode::uuid()))
    }

    fn take_fault(&self, request: &LoggedRequest) -> Option<FaultKind> {
        fault::take(&mut self.state().faults, request)
    }

    fn endpoint(&self) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, self.port)
    }
}

/// The running server; dropping it ends it.
pub struct OciServer {
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
    ca_pem: Option<PathBuf>,
}

impl OciServer {
    /// Starts the server on a runtime of its own.
    pub fn start(options: Options) -> OciServer {
        fs::create_dir_all(&options.dir).unwrap();
        let (tls, ca_pem) = match options.tls.then(|| keys::tls_config(&options.dir)) {
            Some((config, path)) => (Some(TlsAcceptor::from(config)), Some(path)),
            None => (None, None),
        };
        let listener = TcpListener::bind(("127.0.0.1", options.port)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let shared = Arc::new(Shared {
            dir: options.dir,
            namespace: options.namespace,
            keys: options.keys,
            scheme: if tls.is_some() { "https" } else { "http" },
            port: listener.local_addr().unwrap().port(),
            clock_offset: AtomicI64::new(options.clock_offset),
            page_size: options.page_size,
            min_part_size: options.min_part_size,
            forgets_parts: options.forgets_parts,
            par_can_list_parts: options.par_can_list_parts,
            state: Mutex::default(),
        });
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("oci-server")
            .enable_all()
            .build()
            .unwrap();
        runtime.spawn(http::accept(shared.clone(), listener, tls));
        OciServer { shared, runtime: Some(runtime), ca_pem }
    }

    /// For example `http://127.0.0.1:40123`.
    pub fn endpoint(&self) -> String {
        self.shared.endpoint()
    }

    /// The certificate of the authority that clients have to trust, if TLS is on.
    pub fn ca_pem_path(&self) -> Option<&Path> {
        self.ca_pem.as_deref()
    }

    /// Sets how many milliseconds the server's clock is ahead of the machine's.
    pub fn set_clock_offset(&self, millis: i64) {
        self.shared.clock_offset.store(millis, Ordering::Relaxed);
    }

    /// The server's clock, in milliseconds since 1970.
    pub fn now(&self) -> i64 {
        self.shared.now()
    }

    /// Makes an empty bucket.
    pub fn create_bucket(&self, name: &str) {
        let bucket = store::Bucket::new(name, self.shared.now());
        self.shared.state().buckets.insert(name.to_string(), bucket);
    }

    fn with_bucket<T>(&self, name: &str, act: impl FnOnce(&mut store::Bucket) -> T) -> T {
        act(self.shared.state().buckets.get_mut(name).expect("no such bucket"))
    }

    /// Sets whether the bucket keeps versions.
    pub fn set_versioning(&self, bucket: &str, versioning: Versioning) {
        self.with_bucket(bucket, |bucket| bucket.versioning = versioning);
    }

    /// Puts an indefinite retention rule on the bucket, or takes it off: its objects can be neither
    /// overwritten nor deleted.
    pub fn set_retention(&self, bucket: &str, on: bool) {
        self.with_bucket(bucket, |bucket| bucket.retention = on);
    }

    /// Bounds the bytes the bucket may hold, parts included; beyond it writes get `QuotaExceeded`.
    pub fn set_quota(&self, bucket: &str, bytes: Option<u64>) {
        self.with_bucket(bucket, |bucket| bucket.quota = bytes);
    }

    /// Makes a pre-authenticated request and answers its access URI, to append to the endpoint.
    pub fn create_par(&self, bucket: &str, spec: ParSpec) -> String {
        let par = par::Par::new(spec, self.shared.now());
        let uri = par.access_uri(&self.shared.namespace, bucket);
        self.with_bucket(bucket, |bucket| bucket.pars.push(par));
        uri
    }

    /// Deletes every pre-authenticated request of this name.
    pub fn delete_par(&self, bucket: &str, name: &str) {
        self.with_bucket(bucket, |bucket| bucket.pars.retain(|par| par.spec.name != name));
    }

    /// The objects of the bucket by name.
    pub fn objects(&self, bucket: &str) -> Vec<ObjectInfo> {
        self.with_bucket(bucket, |bucket| {
            let info = |(name, object): (&String, &store::Object)| ObjectInfo {
                name: name.clone(),
                size: object.size,
                etag: object.etag.clone(),
                headers: object.headers.iter().chain(&object.checksums).cloned().collect(),
                files: object.blobs.iter().map(|blob| blob.path.clone()).collect(),
            };
            bucket.objects.iter().map(info).collect()
        })
    }

    /// One object, if it is there.
    pub fn object(&self, bucket: &str, name: &str) -> Option<ObjectInfo> {
        self.objects(bucket).into_iter().find(|object| object.name == name)
    }

    /// The bytes of an object; panics if it is not there.
    pub fn read(&self, bucket: &str, name: &str) -> Vec<u8> {
        let blobs: Vec<Arc<Blob>> = self.with_bucket(bucket, |bucket| {
            bucket.objects.get(name).expect("no such object").blobs.clone()
        });
        content::read_all(&blobs)
    }

    /// Removes an object behind the clients' backs; answers whether it was there.
    pub fn remove(&self, bucket: &str, name: &str) -> bool {
        self.with_bucket(bucket, |bucket| bucket.objects.remove(name).is_some())
    }

    /// The multipart uploads in progress.
    pub fn uploads(&self, bucket: &str) -> Vec<UploadInfo> {
        self.with_bucket(bucket, |bucket| {
            let info = |(id, upload): (&String, &store::Multipart)| UploadInfo {
                id: id.clone(),
                object: upload.object.clone(),
                parts: upload.parts.iter().map(part_info).collect(),
            };
            bucket.uploads.iter().map(info).collect()
        })
    }

    /// Forgets an upload, as a lifecycle rule would; answers whether it was there.
    pub fn remove_upload(&self, bucket: &str, id: &str) -> bool {
        self.with_bucket(bucket, |bucket| bucket.uploads.remove(id).is_some())
    }

    /// Sets up a fault for requests to come; faults are tried in the order they were added.
    pub fn add_fault(&self, fault: Fault) {
        self.shared.state().faults.push(fault);
    }

    /// Drops the faults that have not hit yet.
    pub fn clear_faults(&self) {
        self.shared.state().faults.clear();
    }

    /// The requests so far, in the order they ended.
    pub fn requests(&self) -> Vec<LoggedRequest> {
        self.shared.state().log.clone()
    }

    /// Empties the log.
    pub fn clear_requests(&self) {
        self.shared.state().log.clear();
    }
}

fn part_info((number, part): (&u32, &store::Part)) -> PartInfo {
    PartInfo { number: *number, size: part.received.blob.len, etag: part.etag.clone() }
}

impl Drop for OciServer {
    fn drop(&mut self) {
        // Does not wait: a client of the test may still hold a connection open.
        self.runtime.take().unwrap().shutdown_background();
    }
}
