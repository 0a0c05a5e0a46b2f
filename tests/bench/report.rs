//! What was measured, for people and for `target/bench.json`.

use std::{fs, path::Path};

use serde_json::{Map, Value, json};

/// The figures so far.
pub struct Report {
    only: String,
    bench: Map<String, Value>,
    values: Map<String, Value>,
}

impl Report {
    /// Takes names that contain `only`, from the beginning of a word on.
    pub fn new(only: String) -> Self {
        Self { only, bench: Map::new(), values: Map::new() }
    }

    /// Whether `name` is to be measured.
    pub fn wants(&self, name: &str) -> bool {
        name.match_indices(&self.only).any(|(at, _)| at == 0 || name[..at].ends_with('-'))
    }

    /// Medians of both sides, and their ratio.
    pub fn compare(&mut self, name: &str, ours: &[f64], peer: &[f64]) {
        let (ours, peer) = (median(ours), median(peer));
        let ratio = peer / ours;
        println!("bench: {name} ours={ours:.3} peer={peer:.3} ratio={ratio:.2}");
        let figures = json!({"ours": ours, "peer": peer, "ratio": ratio});
        self.bench.insert(name.to_owned(), figures);
    }

    /// A single figure.
    pub fn value(&mut self, name: &str, value: f64, unit: &str) {
        println!("bench-value: {name} {value:.4} {unit}");
        self.values.insert(name.to_owned(), json!({"value": value, "unit": unit}));
    }

    /// Writes `target/bench.json`.
    pub fn write(self) {
        if self.bench.is_empty() && self.values.is_empty() {
            eprintln!("bench: nothing is named like {:?}", self.only);
            std::process::exit(1);
        }
        let commit = crate::lab::run("git", &["rev-parse", "HEAD"]);
        let all = json!({"commit": commit, "bench": self.bench, "values": self.values});
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        fs::write(root.join("target/bench.json"), format!("{all:#}\n")).unwrap();
    }
}

/// The middle one.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
