//! What the fuzzers found once, and inputs that reach far, replayed: `tests/vectors/ring`.

#[allow(dead_code)]
mod fuzzed;

use std::path::Path;

use qpair_reactor::sim::{Rng, run_seeds};

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

/// Changes a few bytes, cuts, or joins with another.
fn mutate(rng: &mut Rng, vectors: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = rng.pick(vectors).1.clone();
    for _ in 0..rng.below(12) {
        let at = rng.below(bytes.len() as u64 + 1) as usize;
        match rng.below(8) {
            0 => bytes.truncate(at),
            1 => bytes.extend(rng.pick(vectors).1.iter().skip(at).take(64)),
            2 => bytes.insert(at, rng.next() as u8),
            3 => bytes[..at].iter_mut().rev().take(4).for_each(|byte| *byte = *rng.pick(&[0, 1, 0x7f, 0x80, 0xff])),
            4 => bytes[..at].iter_mut().rev().take(8).for_each(|byte| *byte = rng.next() as u8),
            _ => bytes[..at].iter_mut().next_back().into_iter().for_each(|byte| *byte ^= 1 << rng.below(8)),
        }
    }
    bytes
}

#[test]
fn random_bytes_and_changed_vectors_are_served_or_refused() {
    let (rings, regions) = (vectors("ring"), vectors("inflight"));
    run_seeds("vhost-bytes", 1500, |seed| {
        let mut rng = Rng::new(seed);
        let mut bytes = vec![0; rng.below(1500) as usize];
        rng.fill(&mut bytes);
        fuzzed::ring(&bytes);
        fuzzed::inflight(&bytes);
        fuzzed::ring(&mutate(&mut rng, &rings));
        fuzzed::inflight(&mutate(&mut rng, &regions));
    });
}
