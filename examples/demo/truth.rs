//! What a program writes, known without trunkline: by running it a second
//! time with a plain pipe, or because its output is plain to see.

use std::error::Error;
use std::fmt::Write as _;
use std::process::Stdio;

use sha2::{Digest as _, Sha256};
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

/// Length and digest of everything that a program wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Truth {
    pub(crate) bytes: u64,
    /// As the protocol writes it: `sha256:` and 64 hex digits.
    pub(crate) digest: String,
}

impl Truth {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self { bytes: bytes.len() as u64, digest: digest(Sha256::new().chain_update(bytes)) }
    }

    /// Runs the program, without any of what this demo is about. In a
    /// terminal a line ends with two characters: `in_terminal` counts them so.
    pub(crate) async fn by_running(
        words: &[String],
        in_terminal: bool,
    ) -> Result<Self, Box<dyn Error>> {
        let [program, args @ ..] = words else { return Err("nothing to run".into()) };
        let mut child = Command::new(program)
            .args(args)
            .env("TERM", "xterm-256color")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("cannot run {program}: {error}"))?;
        let mut stdout = child.stdout.take().ok_or("no standard output")?;
        let mut truth = Sha256::new();
        let mut bytes = 0;
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let len = stdout.read(&mut buffer).await?;
            if len == 0 {
                break;
            }
            let read = &buffer[..len];
            bytes += len as u64;
            if in_terminal {
                for line in read.split_inclusive(|byte| *byte == b'\n') {
                    match line.strip_suffix(b"\n") {
                        Some(text) => {
                            bytes += 1;
                            truth.update(text);
                            truth.update(b"\r\n");
                        }
                        None => truth.update(line),
                    }
                }
            } else {
                truth.update(read);
            }
        }
        child.wait().await?;
        Ok(Self { bytes, digest: digest(truth) })
    }
}

/// A digest as the protocol writes it.
pub(crate) fn digest(hash: Sha256) -> String {
    let mut text = String::from("sha256:");
    for byte in hash.finalize() {
        let _ = write!(text, "{byte:02x}"); // a string takes everything
    }
    text
}
