//! Replays the committed corpora, and what was found on the way, on any
//! toolchain: `cargo test --no-default-features`.

use std::fs;
use std::path::Path;

/// Inputs of every target that are not in a file: the shortest there are.
const SHORT: [&[u8]; 4] = [b"", b"\0", b"\xff", b"{}"];

#[test]
fn every_input_holds() {
    for (name, run) in trunkline_fuzz::TARGETS {
        for input in SHORT {
            run(input);
        }
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        let mut inputs = 0;
        for entry in fs::read_dir(&folder).unwrap_or_else(|_| panic!("no corpus of {name}")) {
            let path = entry.expect("a folder can be read").path();
            let input = fs::read(&path).expect("a corpus can be read");
            // Named before it runs: a panic says nothing of its input.
            println!("{}", path.display());
            run(&input);
            inputs += 1;
        }
        assert!(inputs >= 10, "{name} has a corpus");
    }
}
