//! How fast work goes, and how soon it hears of a change.

use std::{
    thread,
    time::{Duration, Instant},
};

use crate::{
    lab::{Config, Daemon, scratch, wait_for},
    oci::succeed,
    proxy::{self, FaultProxy},
    s3::volume,
    weed::Weed,
};

const MIB: u64 = 1 << 20;

/// Bytes of parts that have been sent so far.
fn sent(proxy: &FaultProxy) -> u64 {
    let of_parts = proxy.body_bytes(|entry| proxy::query(&entry.target, "partNumber").map(drop));
    of_parts.values().sum()
}

/// What was sent by when, until `ended`.
fn watch(proxy: &FaultProxy, ended: impl Fn() -> bool) -> Vec<(Instant, u64)> {
    let mut seen = Vec::new();
    while !ended() {
        seen.push((Instant::now(), sent(proxy)));
        thread::sleep(Duration::from_millis(20));
    }
    seen.push((Instant::now(), sent(proxy)));
    seen
}

/// From the last moment before anything was sent to the first with all.
fn took(seen: &[(Instant, u64)]) -> Duration {
    let all = seen.last().unwrap().1;
    let first = seen.iter().rfind(|(_, sent)| *sent == 0).unwrap().0;
    seen.iter().find(|(_, sent)| *sent == all).unwrap().0 - first
}

/// Most bytes that were sent within a second.
fn most_in_a_second(seen: &[(Instant, u64)]) -> u64 {
    let within = |(at, sent): &(Instant, u64)| {
        let later = seen.iter().take_while(|(then, _)| *then - *at <= Duration::from_secs(1));
        later.last().map_or(0, |(_, later)| later.saturating_sub(*sent))
    };
    seen.iter().map(within).max().unwrap()
}

#[test]
#[ignore = "needs root and SeaweedFS"]
fn root_limits_hold_and_change_while_work_goes_on() {
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let volume = volume(dir.path(), 40);
    let path = volume.to_str().unwrap();
    let weed = Weed::start();
    let proxy = FaultProxy::start(weed.address());
    let dirs = format!("boot_volume_dirs = [{:?}]\nmax_upload_rate = \"500MiB\"\n", dir.path());
    let lines = dirs + &weed.config(proxy.address(), dir.path());
    let daemon = Daemon::start(&Config { lines, ..Config::default() });
    let host = daemon.json(&["host", "get"]);
    assert_eq!(host["data"]["max-upload-rate"], 500 * MIB);

    // 40 MiB at 8 MiB/s.
    let limited = ["image", "create", "--boot-volume", path, "--max-upload-rate", "8MiB"];
    let limited = [&limited[..], &["--wait-for-state", "AVAILABLE"]].concat();
    let mut child = daemon.command(&limited).spawn().unwrap();
    let ended = std::cell::RefCell::new(&mut child);
    let seen = watch(&proxy, || ended.borrow_mut().try_wait().unwrap().is_some());
    let all = seen.last().unwrap().1;
    let wanted = Duration::from_millis(1000 * all / (8 * MIB));
    println!(
        "uploaded {} KiB in {:?}, wanted {wanted:?}; {} KiB in a second at most",
        all >> 10,
        took(&seen),
        most_in_a_second(&seen) >> 10
    );
    assert!(child.wait().unwrap().success() && all >= 40 * MIB, "{all}");
    assert!(took(&seen) > wanted * 8 / 10 && took(&seen) < wanted * 12 / 10);
    assert!(most_in_a_second(&seen) < 10 * MIB);

    // The limit of an export, which is lifted, and then the host's.
    let images = daemon.json(&["image", "list"]);
    let id = images["data"][0]["id"].as_str().unwrap();
    let export = |name: &str, rate: &str| {
        let to = ["image", "export", "to-object", "--image-id", id, "--store", "far"];
        let how = ["--name", name, "--max-upload-rate", rate, "--wait-for-state", "ACCEPTED"];
        proxy.clear();
        let work = daemon.json(&[&to[..], &how].concat());
        work["data"]["id"].as_str().unwrap().to_owned()
    };
    let status = |work: &str| {
        let shown = daemon.json(&["work-request", "get", "--work-request-id", work]);
        shown["data"].clone()
    };
    for host in [false, true] {
        let (name, rate) = if host { ("a", "400MiB") } else { ("b", "2MiB") };
        if host {
            succeed(&daemon, &["host", "update", "--max-upload-rate", "2MiB"]);
        }
        let work = export(name, rate);
        wait_for("some bytes", Duration::from_secs(10), || (sent(&proxy) > MIB).then_some(()));
        let before = sent(&proxy);
        thread::sleep(Duration::from_secs(2));
        let in_two_seconds = sent(&proxy) - before;
        println!("{} KiB in two seconds at 2 MiB/s", in_two_seconds >> 10);
        assert!((3 * MIB..5 * MIB + MIB / 2).contains(&in_two_seconds), "{in_two_seconds}");
        match host {
            true => succeed(&daemon, &["host", "update", "--max-upload-rate", "unlimited"]),
            false => {
                assert_eq!(status(&work)["max-upload-rate"], 2 * MIB);
                let update = ["work-request", "update", "--work-request-id", &work];
                let answer =
                    daemon.json(&[&update[..], &["--max-upload-rate", "unlimited"]].concat());
                assert_eq!(answer["data"]["max-upload-rate"], serde_json::Value::Null);
            }
        }
        let lifted = Instant::now();
        wait_for("the export", Duration::from_secs(20), || {
            (status(&work)["status"] == "SUCCEEDED").then_some(())
        });
        println!("done {:?} after the limit was lifted", lifted.elapsed());
        assert!(lifted.elapsed() < Duration::from_secs(6));
    }

    // A cancellation does not wait for a limit.
    let work = export("canceled", "1MiB");
    wait_for("some bytes", Duration::from_secs(10), || (sent(&proxy) > 0).then_some(()));
    let canceled = Instant::now();
    succeed(&daemon, &["work-request", "cancel", "--work-request-id", &work]);
    wait_for("its end", Duration::from_secs(5), || {
        (status(&work)["status"] == "CANCELED").then_some(())
    });
    assert!(canceled.elapsed() < Duration::from_secs(3), "{:?}", canceled.elapsed());
    assert_eq!(weed.uploads(), 0);

    // What is read: 43 MiB of data at 8 MiB/s.
    let begin = Instant::now();
    let image = daemon.create(&volume, &["--max-read-rate", "8MiB"]);
    let took = begin.elapsed();
    println!("read 43 MiB in {took:?}");
    assert!(took > Duration::from_millis(4300) && took < Duration::from_millis(8000), "{took:?}");
    succeed(&daemon, &["image", "verify", "--image-id", image["id"].as_str().unwrap()]);
    succeed(&daemon, &["host", "update", "--max-read-rate", "2MiB"]);
    let create = ["image", "create", "--boot-volume", path, "--output", "json"];
    let answer: serde_json::Value =
        serde_json::from_slice(&daemon.imagectl(&create).stdout).unwrap();
    let work = answer["opc-work-request-id"].as_str().unwrap().to_owned();
    thread::sleep(Duration::from_secs(3));
    let read = status(&work)["progress"]["bytes-read"].as_u64().unwrap();
    println!("{} KiB read in three seconds at 2 MiB/s", read >> 10);
    assert!((2 * MIB..=9 * MIB).contains(&read), "{read}");
    succeed(&daemon, &["host", "update", "--max-read-rate", "unlimited"]);
    wait_for("the image", Duration::from_secs(6), || {
        (status(&work)["status"] == "SUCCEEDED").then_some(())
    });
    insta::assert_snapshot!(daemon.refusal(&["host", "update", "--max-read-rate", "1KiB"]), @"
    error: invalid value '1KiB' for '--max-read-rate <SIZE>': less than 1MiB a second would never come to an end

    For more information, try '--help'.
    ");
    insta::assert_snapshot!(daemon.refusal(&["host", "update", "--max-read-rate", "8"]), @r#"
    error: invalid value '8' for '--max-read-rate <SIZE>': a size is a whole number and a unit, such as "400GiB" or "400GB"; or "unlimited"

    For more information, try '--help'.
    "#);
}
