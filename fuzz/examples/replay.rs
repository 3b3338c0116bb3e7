//! Runs inputs through a target without a fuzzer, for a debugger or a look:
//! `cargo run --no-default-features --example replay -- TARGET FILE…`.

fn main() {
    let mut args = std::env::args().skip(1);
    let name = args.next().unwrap_or_default();
    let target = trunkline_fuzz::TARGETS.iter().find(|(target, _)| *target == name);
    let Some((_, run)) = target else { panic!("no target is called `{name}`") };
    for path in args {
        println!("{path}");
        run(&std::fs::read(&path).expect("a file that can be read"));
    }
}
