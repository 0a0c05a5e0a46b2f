//! What people move images with today, as fast as its settings make it.

use std::{
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    lab::run,
    report::{Report, median},
    weed::{ACCESS_KEY, BUCKET, SECRET_KEY},
};

/// What a try of this round takes. In round 0 it is checked what came of it.
pub type Try<'a> = Box<dyn FnMut(usize) -> Duration + 'a>;

/// Compares `ours` with the fastest of `peers`, and tells what each of them
/// took. Returns our median.
///
/// All alternate, and each clears away what it made. Round 0 warms the
/// machine up.
pub fn versus(
    report: &mut Report,
    name: &str,
    mut ours: Try<'_>,
    peers: &mut [(&str, Try<'_>)],
) -> f64 {
    let (mut our_seconds, mut seconds) = (Vec::new(), vec![Vec::new(); peers.len()]);
    for round in 0..=crate::ROUNDS {
        let tell = |seconds: &mut Vec<f64>, took: Duration| {
            if round > 0 {
                seconds.push(took.as_secs_f64());
            }
        };
        tell(&mut our_seconds, ours(round));
        for ((_, peer), seconds) in peers.iter_mut().zip(&mut seconds) {
            tell(seconds, peer(round));
        }
    }
    for ((peer, _), seconds) in peers.iter().zip(&seconds) {
        report.value(&format!("{name}-by-{peer}"), median(seconds), "s");
    }
    let fastest = seconds.iter().min_by(|a, b| median(a).total_cmp(&median(b))).unwrap();
    report.compare(name, &our_seconds, fastest);
    median(&our_seconds)
}

/// How long `deed` takes.
pub fn timed(deed: impl FnOnce()) -> Duration {
    let start = Instant::now();
    deed();
    start.elapsed()
}

/// A device as a compressed qcow2 in a file that is to be uploaded. The file
/// stays in memory for that: of the settings that are advised for speed these
/// are the fastest, and with `-t none` it would be read again.
pub fn convert(device: &Path, to: &Path) {
    let (device, to) = (device.to_str().unwrap(), to.to_str().unwrap());
    let fast = ["convert", "-W", "-m", "16", "-T", "none", "-f", "raw", "-O", "qcow2"];
    run("qemu-img", &[&fast[..], &["-c", "-o", "compression_type=zstd", device, to]].concat());
}

/// A client of S3, with its defaults.
#[derive(Clone, Copy)]
pub enum S3Client {
    S5cmd,
    Aws,
}

/// Each, and what it is called.
pub const S3_CLIENTS: [(&str, S3Client); 2] = [("s5cmd", S3Client::S5cmd), ("aws", S3Client::Aws)];

/// The clients, for one service.
pub struct S3Clients {
    packages: PathBuf,
    endpoint: String,
}

impl S3Clients {
    /// Those for the service at `address`.
    pub fn of(address: SocketAddr) -> Self {
        let packages = run("tests/lab/python.sh", &["peers"]).into();
        Self { packages, endpoint: format!("http://{address}") }
    }

    /// Copies a file into the bucket, or an object out of it.
    pub fn copy(&self, client: S3Client, from: &str, to: &str) {
        let mut command = match client {
            S3Client::S5cmd => self.s5cmd(),
            S3Client::Aws => {
                let mut command = Command::new("python3");
                command.args(["-m", "awscli", "s3", "--only-show-errors"]);
                command.args(["--endpoint-url", &self.endpoint]);
                command
            }
        };
        self.finish(command.args(["cp", from, to]));
    }

    /// Removes an object.
    pub fn remove(&self, name: &str) {
        self.finish(self.s5cmd().args(["rm", &Self::url(name)]));
    }

    /// Has the programs in memory, but nothing of what they are to move:
    /// imaged, which runs all the time, is there too.
    pub fn warm(&self, client: S3Client) {
        self.copy(client, "Cargo.toml", &Self::url("warm"));
        run("qemu-img", &["--version"]);
    }

    /// What an object is called.
    pub fn url(name: &str) -> String {
        format!("s3://{BUCKET}/{name}")
    }

    fn s5cmd(&self) -> Command {
        // The script in `bin` would start Python first.
        let mut command = Command::new(self.packages.join("s5cmd/bin/s5cmd"));
        command.args(["--log", "error", "--endpoint-url", &self.endpoint]);
        command
    }

    fn finish(&self, command: &mut Command) {
        command.env("PYTHONPATH", &self.packages);
        command.envs([("AWS_ACCESS_KEY_ID", ACCESS_KEY), ("AWS_SECRET_ACCESS_KEY", SECRET_KEY)]);
        command.envs([("AWS_REGION", "us-east-1"), ("AWS_EC2_METADATA_DISABLED", "true")]);
        // Nothing of whoever runs this.
        for file in ["AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"] {
            command.env(file, "/dev/null");
        }
        let output = command.stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?}: {said}");
    }
}

/// The official SDK for OCI: its upload manager, which does parts in
/// parallel. It has been started, and knows the service.
pub struct UploadManager {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl UploadManager {
    /// One for the bucket at `endpoint`.
    pub fn start(profile: &Path, endpoint: &str, bucket: &str) -> Self {
        let script = format!(
            "import oci, os, sys\n\
             from oci.object_storage import ObjectStorageClient, UploadManager\n\
             for name in ('REQUESTS_CA_BUNDLE', 'CURL_CA_BUNDLE'): os.environ.pop(name, None)\n\
             config = oci.config.from_file({profile:?})\n\
             client = ObjectStorageClient(config, service_endpoint={endpoint:?})\n\
             manager, ns = UploadManager(client), client.get_namespace().data\n\
             print('ready', flush=True)\n\
             for line in sys.stdin:\n  \
             name, file, *size = line.split()\n  \
             more = {{'part_size': int(size[0])}} if size else {{}}\n  \
             manager.upload_file(ns, {bucket:?}, name, file, **more)\n  \
             print('done', flush=True)\n"
        );
        let mut child = Command::new("python3")
            .args(["-c", &script])
            .env("PYTHONPATH", run("tests/lab/python.sh", &[]))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut manager = Self { child, answers };
        manager.expect("ready");
        manager
    }

    /// Uploads `file`, in parts of `part_size` bytes unless that is its own
    /// choice.
    pub fn upload(&mut self, name: &str, file: &Path, part_size: Option<u64>) {
        let part_size = part_size.map_or_else(String::new, |size| size.to_string());
        let stdin = self.child.stdin.as_mut().unwrap();
        writeln!(stdin, "{name} {} {part_size}", file.display()).unwrap();
        self.expect("done");
    }

    fn expect(&mut self, word: &str) {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), word, "the SDK failed");
    }
}

impl Drop for UploadManager {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
