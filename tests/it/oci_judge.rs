//! OCI's own SDK judges the server that the other tests believe.

use std::{collections::BTreeMap, path::PathBuf};

use crate::{
    lab::{python, scratch},
    oci_server::{ApiKey, OciServer, Options, Versioning},
};

const JUDGE: &str = include_str!("../lab/oci_judge.py");

#[test]
#[ignore = "needs OCI's SDK"]
fn root_oci_the_official_sdk_finds_the_test_server_to_be_as_it_expects() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let offsets = [-299_000, 298_000, 302_000, -303_000];
    let mut flags = vec![String::new(), String::new(), "--tls".into()];
    flags.extend(offsets.map(|millis| format!("--clock-offset {millis}")));
    let mut servers: BTreeMap<String, Vec<(PathBuf, String)>> = BTreeMap::new();
    let mut running = Vec::new();
    for (number, flags) in flags.into_iter().enumerate() {
        let dir = dir.path().join(number.to_string());
        let server = start(&dir, &flags);
        servers.entry(flags).or_default().push((dir, server.endpoint()));
        running.push(server);
    }
    let servers = serde_json::to_string(&servers).unwrap();
    println!("{}", python(&format!("import json\nSERVERS = json.loads({servers:?})\n{JUDGE}")));
}

fn start(dir: &std::path::Path, flags: &str) -> OciServer {
    let key = ApiKey::generate();
    key.write_profile(&dir.join("client"), "DEFAULT", "us-ashburn-1").unwrap();
    let mut options = Options::new(dir.join("store"), vec![key.trusted()]);
    options.page_size = 2;
    options.tls = flags == "--tls";
    if let Some(millis) = flags.strip_prefix("--clock-offset ") {
        options.clock_offset = millis.parse().unwrap();
    }
    let server = OciServer::start(options);
    for bucket in ["bucket", "versioned", "retained", "small"] {
        server.create_bucket(bucket);
    }
    server.set_versioning("versioned", Versioning::Enabled);
    server.set_retention("retained", true);
    server.set_quota("small", Some(1 << 20));
    server
}
