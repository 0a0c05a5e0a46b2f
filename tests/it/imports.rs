//! Imports point down only.

use std::{fs, path::Path};

/// Who may import whom, top to bottom. A module that is not named here may
/// not exist.
const ALLOWED: &[(&str, &[&str])] = &[
    (
        "daemon",
        &[
            "rpc",
            "work",
            "catalogue",
            "ADAPTERS",
            "config",
            "steps",
            "sys",
            "port",
            "model",
            "error",
        ],
    ),
    ("rpc", &["work", "catalogue", "model", "error", "pb", "sys"]),
    ("ctl", &["pb", "model", "error"]),
    ("work", &["port", "recorder", "catalogue", "encode", "format", "compat", "model", "error"]),
    ("encode", &["port", "format", "sys", "model", "error"]),
    ("hypervisor", &["port", "recorder", "format", "exec", "steps", "sys", "model", "error"]),
    ("block", &["port", "exec", "steps", "sys", "model", "error"]),
    ("store", &["port", "exec", "steps", "sys", "model", "error"]),
    ("journal", &["port", "exec", "steps", "sys", "model", "error"]),
    ("vault", &["port", "exec", "steps", "sys", "model", "error"]),
    // It decodes and recomputes digests, in a process of its own.
    ("worker", &["port", "encode", "format", "sys", "model", "error"]),
    ("catalogue", &["port", "model", "error"]),
    ("format", &["port", "model", "error"]),
    ("port", &["recorder", "model", "error"]),
    ("recorder", &["model"]),
    ("config", &["model", "error"]),
    ("error", &["model"]),
    ("sys", &[]),
    ("steps", &[]),
    ("model", &[]),
    ("pb", &[]),
];
const ADAPTERS: &[&str] = &["hypervisor", "block", "store", "journal", "vault", "worker"];

#[test]
fn imports_point_down_only() {
    let mut wrong = Vec::new();
    let mut modules = 0;
    for entry in fs::read_dir("src").unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if name == "lib" || name == "bin" {
            continue;
        }
        let Some((_, allowed)) = ALLOWED.iter().find(|(module, _)| *module == name) else {
            wrong.push(format!("src/{name}: not in the table of tests/it/imports.rs"));
            continue;
        };
        modules += 1;
        walk(&path, &mut |file| check(file, &name, allowed, &mut wrong));
    }
    assert!(modules >= 10, "the sources were not found");
    assert!(wrong.is_empty(), "imports that point up or sideways:\n{}", wrong.join("\n"));
}

fn check(file: &Path, module: &str, allowed: &[&str], wrong: &mut Vec<String>) {
    let text = fs::read_to_string(file).unwrap();
    // Tests may use what they like.
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    for (at, imported) in imports(code) {
        let ok = imported == module
            || allowed.contains(&imported)
            || (allowed.contains(&"ADAPTERS") && ADAPTERS.contains(&imported));
        if !ok {
            let line = code[..at].lines().count();
            wrong.push(format!("{}:{line}: crate::{imported}", file.display()));
        }
    }
}

/// The modules that code names, each with where: `crate::x`, and the items of
/// `crate::{…}`.
fn imports(code: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    for (at, prefix) in code.match_indices("crate::") {
        let line_start = code[..at].rfind('\n').map_or(0, |newline| newline + 1);
        if code[line_start..at].contains("//") {
            continue;
        }
        let start = at + prefix.len();
        if !code[start..].starts_with('{') {
            found.push((at, identifier(&code[start..])));
            continue;
        }
        let (mut depth, mut item) = (0, true);
        for (offset, c) in code[start..].char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => item = true,
                c if depth == 1 && item && c.is_alphabetic() => {
                    found.push((start + offset, identifier(&code[start + offset..])));
                    item = false;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    found
}

fn identifier(text: &str) -> &str {
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len());
    &text[..end]
}

#[test]
fn groups_and_paths_are_understood() {
    let code = "use crate::{\n    error::{Error, Result},\n    model::ids,\n};\n\
                /// [`crate::ignored`]\nlet x = crate::sys::now();";
    let names: Vec<_> = imports(code).into_iter().map(|(_, name)| name).collect();
    assert_eq!(names, ["error", "model", "sys"]);
}

fn walk(path: &Path, visit: &mut impl FnMut(&Path)) {
    if path.is_dir() {
        let mut entries: Vec<_> = fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).collect();
        entries.sort();
        entries.iter().for_each(|entry| walk(entry, visit));
    } else if path.extension().is_some_and(|extension| extension == "rs") {
        visit(path);
    }
}
