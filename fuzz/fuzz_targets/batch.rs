#![no_main]
#![allow(missing_docs, reason = "a program is not read")]

libfuzzer_sys::fuzz_target!(|data: &[u8]| trunkline_fuzz::batch::run(data));
