//! What the fuzzers found once, and inputs that reach far, replayed: `tests/vectors/ring`.

#[allow(dead_code)]
mod fuzzed;

use std::path::Path;

use qpair_reactor::sim::Rng;

fn vectors(kind: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors/ring").join(kind);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    entries.map(|entry| entry.unwrap().path()).map(|path| (path.display().to_string(), std::fs::read(path).unwrap())).collect()
}

fn replay(kind: &str, run: fn(&[u8])) {
    let vectors = vectors(kind);
    assert!(!vectors.is_empty());
    for (name, content) in vectors {
        eprintln!("{name}");
        run(&content);
    }
}

#[test]
fn rings_that_were_fuzzed_are_served_or_refused() {
    replay("ring", fuzzed::ring);
}

#[test]
fn inflight_regions_that_were_fuzzed_are_recovered_or_refused() {
    replay("inflight", fuzzed::inflight);
}

#[test]
fn random_bytes_are_served_or_refused() {
    for seed in 0..500 {
        let mut rng = Rng::new(seed);
        let mut bytes = vec![0; rng.below(1500) as usize];
        rng.fill(&mut bytes);
        fuzzed::ring(&bytes);
        fuzzed::inflight(&bytes);
    }
}
