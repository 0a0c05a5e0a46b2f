//! SeaweedFS: a real S3 service of the test's own.
// Not every user of the module needs all of it.
#![allow(dead_code)]

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use crate::lab::{cpu_seconds, python, run, scratch, wait_for};

/// The key that it knows.
pub const ACCESS_KEY: &str = "imagedtest";
/// Its secret.
pub const SECRET_KEY: &str = "imagedtestsecret";
/// Its bucket.
pub const BUCKET: &str = "images";

/// Each service that it consists of listens on a port, and on another for
/// gRPC. All must be given: it has defaults for the others, which collide.
const SERVICES: [&str; 5] = ["master", "volume", "filer", "s3", "admin"];

/// A running SeaweedFS; ended with this value.
pub struct Weed {
    child: Child,
    dir: tempfile::TempDir,
    ports: Vec<u16>,
}

impl Weed {
    /// Starts one with an empty bucket.
    pub fn start() -> Self {
        let dir = tempfile::tempdir_in(scratch()).unwrap();
        // Held until all are known, so that they differ.
        let listeners: Vec<_> =
            SERVICES.iter().chain(&SERVICES).map(|_| TcpListener::bind("127.0.0.1:0")).collect();
        let port = |listener: &Result<TcpListener, _>| -> u16 {
            listener.as_ref().unwrap().local_addr().unwrap().port()
        };
        let ports: Vec<_> = listeners.iter().map(port).collect();
        drop(listeners);
        let child = spawn(dir.path(), &ports);
        let weed = Self { child, dir, ports };
        wait_for("SeaweedFS's bucket", Duration::from_secs(60), || {
            let log = fs::read_to_string(weed.dir.path().join("log")).unwrap_or_default();
            log.contains("created bucket").then_some(())
        });
        weed
    }

    /// Kills it, and starts it again with all that it had stored.
    pub fn restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = spawn(self.dir.path(), &self.ports);
        wait_for("SeaweedFS", Duration::from_secs(60), || TcpStream::connect(self.address()).ok());
    }

    /// Processor time that it has taken so far, in seconds.
    pub fn cpu_seconds(&self) -> f64 {
        cpu_seconds(self.child.id())
    }

    /// The S3 service's address.
    pub fn address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.ports[2 * 3]).into()
    }

    /// Runs Python with boto3: `s3` is the client, `bucket` the bucket.
    pub fn python(&self, script: &str) -> String {
        let prologue = format!(
            "import boto3, sys, json\nfrom botocore.config import Config\nbucket = '{BUCKET}'\n\
             s3 = boto3.client('s3', endpoint_url='http://{}', aws_access_key_id='{ACCESS_KEY}',\n  \
             aws_secret_access_key='{SECRET_KEY}', region_name='us-east-1',\n  \
             config=Config(s3={{'addressing_style': 'path'}}))\n",
            self.address()
        );
        python(&format!("{prologue}{script}"))
    }

    /// Names of all objects, in order.
    pub fn keys(&self) -> Vec<String> {
        let listed = self.python(
            "for page in s3.get_paginator('list_objects_v2').paginate(Bucket=bucket):\n  \
             for o in page.get('Contents', []): print(o['Key'])\n",
        );
        listed.lines().map(str::to_owned).collect()
    }

    /// How many uploads are begun and not ended.
    pub fn uploads(&self) -> usize {
        let count = "print(len(s3.list_multipart_uploads(Bucket=bucket).get('Uploads', [])))";
        self.python(count).parse().unwrap()
    }

    /// The lines of a configuration for the store `far` in its bucket, by way
    /// of `address`, and the default; its keys are in a file in `dir`.
    pub fn config(&self, address: SocketAddr, dir: &Path) -> String {
        let keys = dir.join("s3.keys");
        let text = format!(
            "[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
        );
        fs::write(&keys, text).unwrap();
        fs::set_permissions(&keys, fs::Permissions::from_mode(0o600)).unwrap();
        format!(
            "default_store = \"far\"\n[stores.far]\nkind = \"s3\"\n\
             endpoint = \"http://{address}\"\nbucket = \"{BUCKET}\"\ncredentials = {keys:?}\n"
        )
    }
}

fn spawn(dir: &Path, ports: &[u16]) -> Child {
    let weed = run("tests/lab/weed.sh", &["install"]);
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", &weed, "-logtostderr", "mini"]);
    command.args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false"]);
    // It would tell its makers of itself.
    command.args(["-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]);
    command.args(["-s3.autoCreateBucket=false", "-s3.allowDeleteBucketNotEmpty=false"]);
    command.arg(format!("-bucket={BUCKET}")).arg(format!("-dir={}", dir.join("data").display()));
    for (service, ports) in SERVICES.iter().zip(ports.chunks(2)) {
        command.arg(format!("-{service}.port={}", ports[0]));
        command.arg(format!("-{service}.port.grpc={}", ports[1]));
    }
    fs::create_dir_all(dir.join("data")).unwrap();
    let log = fs::File::create(dir.join("log")).unwrap();
    let keys = [("AWS_ACCESS_KEY_ID", ACCESS_KEY), ("AWS_SECRET_ACCESS_KEY", SECRET_KEY)];
    command.envs(keys).env("GOMEMLIMIT", "400MiB").current_dir(dir);
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
}

impl Drop for Weed {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // It leaves sockets with its ports in their names.
        let sockets = fs::read_dir("/tmp").unwrap().filter_map(Result::ok);
        for socket in sockets {
            let name = socket.file_name().to_string_lossy().into_owned();
            let port = name.strip_prefix("seaweedfs-").and_then(|name| name.strip_suffix(".sock"));
            let port = port.and_then(|name| name.rsplit('-').next()?.parse().ok());
            if port.is_some_and(|port| self.ports.contains(&port)) {
                let _ = fs::remove_file(socket.path());
            }
        }
    }
}
