//! The rule for compatible change, `docs/api-compatibility.md`, checked
//! against the protos of every release.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    MethodDescriptorProto,
};

/// What clients may rely on: each part by its full name, with everything that
/// must stay as it is. A part that is there may only be joined by others.
type Surface = BTreeMap<String, String>;

fn surface(set: &FileDescriptorSet) -> Surface {
    let mut parts = Surface::new();
    for file in &set.file {
        // Not ours to change.
        if file.package().starts_with("google.") {
            continue;
        }
        for message in &file.message_type {
            message_parts(file.package(), message, &mut parts);
        }
        for values in &file.enum_type {
            enum_parts(file.package(), values, &mut parts);
        }
        for service in &file.service {
            let name = format!("{}.{}", file.package(), service.name());
            for method in &service.method {
                parts.insert(format!("rpc {name}.{}", method.name()), signature(method));
            }
            parts.insert(format!("service {name}"), String::new());
        }
    }
    parts
}

fn message_parts(scope: &str, message: &DescriptorProto, parts: &mut Surface) {
    let name = format!("{scope}.{}", message.name());
    for field in &message.field {
        parts.insert(format!("field {name}.{}", field.name()), field_facts(message, field));
    }
    for below in &message.nested_type {
        message_parts(&name, below, parts);
    }
    for values in &message.enum_type {
        enum_parts(&name, values, parts);
    }
    parts.insert(format!("message {name}"), String::new());
}

fn field_facts(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let member = match field.oneof_index {
        _ if field.proto3_optional() => " optional".to_owned(),
        Some(index) => {
            let oneof = usize::try_from(index).ok().and_then(|index| message.oneof_decl.get(index));
            format!(" of oneof {}", oneof.map_or("?", |oneof| oneof.name()))
        }
        None => String::new(),
    };
    format!(
        "number {} {:?} {:?} {}{member}, in JSON {}",
        field.number(),
        field.label(),
        field.r#type(),
        field.type_name(),
        field.json_name()
    )
}

fn enum_parts(scope: &str, values: &EnumDescriptorProto, parts: &mut Surface) {
    let name = format!("{scope}.{}", values.name());
    for value in &values.value {
        let facts = format!("number {}", value.number());
        parts.insert(format!("value {name}.{}", value.name()), facts);
    }
    parts.insert(format!("enum {name}"), String::new());
}

fn signature(method: &MethodDescriptorProto) -> String {
    let stream = |streams: bool| if streams { "stream " } else { "" };
    format!(
        "({}{}) returns ({}{})",
        stream(method.client_streaming()),
        method.input_type(),
        stream(method.server_streaming()),
        method.output_type()
    )
}

/// What `new` breaks of `old`.
fn broken(old: &Surface, new: &Surface) -> Vec<String> {
    let mut broken = Vec::new();
    for (part, facts) in old {
        match new.get(part) {
            None => broken.push(format!("{part} is gone")),
            Some(now) if now != facts => broken.push(format!("{part} was {facts}, is {now}")),
            Some(_) => {}
        }
    }
    broken
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("proto")
}

fn compile(include: &Path) -> FileDescriptorSet {
    let dir = include.join("imaged/v1");
    let files = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
    let protos: Vec<_> =
        files.filter(|path| path.extension().is_some_and(|name| name == "proto")).collect();
    assert!(!protos.is_empty(), "{} has no protos", dir.display());
    protox::compile(protos, [include]).unwrap()
}

#[test]
fn nothing_that_was_released_is_broken() {
    let now = surface(&compile(&root()));
    let mut releases: Vec<_> =
        fs::read_dir(root().join("released")).unwrap().map(|entry| entry.unwrap().path()).collect();
    releases.sort();
    assert!(!releases.is_empty());
    let mut broken_by_release = Vec::new();
    for release in releases {
        let old = surface(&compile(&release));
        assert!(old.len() > 100, "{} has {} parts", release.display(), old.len());
        let name = release.file_name().unwrap().to_string_lossy().into_owned();
        broken_by_release
            .extend(broken(&old, &now).into_iter().map(|what| format!("{name}: {what}")));
    }
    assert!(broken_by_release.is_empty(), "{}", broken_by_release.join("\n"));
}

#[test]
fn numbers_are_used_once() {
    // The compiler refuses the same number twice in one message; across
    // releases a number must not come back under another name.
    let mut used: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let releases =
        fs::read_dir(root().join("released")).unwrap().map(|entry| entry.unwrap().path());
    for include in releases.chain([root()]) {
        for (part, facts) in surface(&compile(&include)) {
            let Some((scope, name)) = part.rsplit_once('.') else { continue };
            let number = facts.split(' ').nth(1).filter(|_| facts.starts_with("number "));
            if let Some(number) = number {
                used.entry(format!("{scope} {number}")).or_default().insert(name.to_owned());
            }
        }
    }
    used.retain(|_, names| names.len() > 1);
    assert!(used.is_empty(), "{used:?}");
}

const BEFORE: &str = r#"
syntax = "proto3";
package imaged.v1;
service S {
  rpc Get(Ask) returns (Thing);
  rpc Watch(Ask) returns (stream Thing);
}
message Ask { string id = 1; }
message Thing {
  enum State { STATE_UNSPECIFIED = 0; OPEN = 1; }
  string id = 1;
  State state = 2;
  repeated string names = 3;
  optional uint64 size = 4;
  oneof source { string path = 5; string uri = 6; }
  map<string, string> tags = 7;
}
"#;

fn surface_of(text: &str) -> Surface {
    let dir = tempfile::tempdir().unwrap();
    let below = dir.path().join("imaged/v1");
    fs::create_dir_all(&below).unwrap();
    fs::write(below.join("s.proto"), text).unwrap();
    surface(&compile(dir.path()))
}

/// What is broken when `what` in the made-up API becomes `by`.
fn replacing(what: &str, by: &str) -> Vec<String> {
    assert_eq!(BEFORE.matches(what).count(), 1, "{what}");
    broken(&surface_of(BEFORE), &surface_of(&BEFORE.replace(what, by)))
}

#[test]
fn additions_break_nothing() {
    for (what, by) in [
        (
            "rpc Get(Ask) returns (Thing);",
            "rpc Get(Ask) returns (Thing); rpc Put(Thing) returns (Ask);",
        ),
        ("OPEN = 1;", "OPEN = 1; SHUT = 2;"),
        ("string id = 1; }", "string id = 1; bool all = 2; }"),
        ("string uri = 6;", "string uri = 6; bytes inline = 8;"),
        ("message Ask", "message Other {} message Ask"),
    ] {
        assert_eq!(replacing(what, by), [""; 0], "{by}");
    }
}

#[test]
fn each_incompatible_change_is_found() {
    let cases = [
        ("rpc Get(Ask) returns (Thing);", ""),
        ("rpc Get(Ask)", "rpc Fetch(Ask)"),
        ("rpc Get(Ask) returns (Thing)", "rpc Get(Thing) returns (Thing)"),
        ("returns (stream Thing)", "returns (Thing)"),
        ("service S", "service T"),
        ("OPEN = 1;", ""),
        ("OPEN = 1;", "OPENED = 1;"),
        ("OPEN = 1;", "OPEN = 2;"),
        ("string id = 1; }", "string key = 1; }"),
        ("string id = 1; }", "string id = 2; }"),
        ("string id = 1; }", "bytes id = 1; }"),
        ("string id = 1; }", "reserved 1; }"),
        ("string id = 1; }", "optional string id = 1; }"),
        ("string id = 1; }", "string id = 1 [json_name = \"key\"]; }"),
        ("repeated string names", "string names"),
        ("optional uint64 size", "uint64 size"),
        ("State state = 2;", "int32 state = 2;"),
        ("string uri = 6; }", "} string uri = 6;"),
        ("oneof source", "oneof origin"),
        ("map<string, string> tags", "map<string, bytes> tags"),
    ];
    for (what, by) in cases {
        let found = replacing(what, by);
        assert!(!found.is_empty(), "{what} -> {by}");
    }
    assert_eq!(
        replacing("OPEN = 1;", "OPEN = 2;"),
        ["value imaged.v1.Thing.State.OPEN was number 1, is number 2"]
    );
    assert_eq!(replacing("string id = 1; }", "reserved 1; }"), ["field imaged.v1.Ask.id is gone"]);
}
