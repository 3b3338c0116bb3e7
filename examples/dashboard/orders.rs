//! What a person may say, and what it means.

use trunkline_client::Request;
use trunkline_client::protocol::message::Priority;

/// What `help` prints.
pub(crate) const HELP: &str = "\
agents                      who is there, and how busy
commands                    what was run, and how it ended
run AGENT [OPTIONS] -- CMD  run a program; its output is shown
      --priority high|normal|low   its place in the agent's queue
      --for SECONDS                end it after that long
      --retry                      run it again if nobody knows how it ended
      --pipes                      without a terminal (which is 80 by 24)
      --bg | --wait                return at once | when it has ended
watch COMMAND|AGENT         show what it writes, from the oldest byte kept
unwatch COMMAND|AGENT       no more of that
wait COMMAND                until it has ended and its output is here
input COMMAND TEXT          type a line into it
interrupt COMMAND           take it from the queue, or have it end
stop-all [AGENT...]         the same for everything
queue AGENT                 what waits, next first
search COMMAND TEXT         lines of its output
export COMMAND FILE         its output, byte for byte
quit
A COMMAND is the beginning or end of its id, or `last`. CMD may be quoted as
in a shell: run build-1 -- sh -c 'sleep 1; echo done'";

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Order {
    Agents,
    Commands,
    Run { agent: String, request: Request, wait: Option<bool> },
    Watch(String),
    Unwatch(String),
    Wait(String),
    Input { command: String, text: String },
    Interrupt(String),
    StopAll(Vec<String>),
    Queue(String),
    Search { command: String, text: String },
    Export { command: String, file: String },
    Help,
    Quit,
}

impl Order {
    /// Reads a line. Nothing is asked for in an empty one, or in a comment.
    pub(crate) fn parse(line: &str) -> Result<Option<Self>, String> {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            return Ok(None);
        }
        let (verb, rest) = first_word(line);
        let one = |what: &str| match words(rest)?.as_slice() {
            [word] => Ok(word.clone()),
            _ => Err(format!("{verb} {what}: what is missing, or too much? See `help`")),
        };
        let two = |what: &str| match first_word(rest) {
            (first, second) if !second.is_empty() => Ok((first.to_owned(), second.to_owned())),
            _ => Err(format!("{verb} COMMAND {what}: something is missing; see `help`")),
        };
        let order = match verb {
            "agents" => Self::Agents,
            "commands" => Self::Commands,
            "run" => run(rest)?,
            "watch" => Self::Watch(one("COMMAND|AGENT")?),
            "unwatch" => Self::Unwatch(one("COMMAND|AGENT")?),
            "wait" => Self::Wait(one("COMMAND")?),
            "input" => {
                let (command, text) = two("TEXT")?;
                Self::Input { command, text }
            }
            "interrupt" => Self::Interrupt(one("COMMAND")?),
            "stop-all" => Self::StopAll(words(rest)?),
            "queue" => Self::Queue(one("AGENT")?),
            "search" => {
                let (command, text) = two("TEXT")?;
                Self::Search { command, text }
            }
            "export" => {
                let (command, file) = two("FILE")?;
                Self::Export { command, file }
            }
            "help" | "?" => Self::Help,
            "quit" | "exit" => Self::Quit,
            _ => return Err("that is no order; see `help`".to_owned()),
        };
        Ok(Some(order))
    }
}

fn first_word(text: &str) -> (&str, &str) {
    let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    (word, rest.trim_start())
}

fn run(rest: &str) -> Result<Order, String> {
    const USAGE: &str = "run AGENT [OPTIONS] -- CMD: see `help`";
    let words = words(rest)?;
    let mut words = words.into_iter();
    let agent = words.next().ok_or(USAGE)?;
    let (mut priority, mut run_for, mut retry) = (Priority::Normal, None, false);
    let (mut terminal, mut wait) = (true, None);
    loop {
        match words.next().ok_or(USAGE)?.as_str() {
            "--" => break,
            "--priority" => {
                priority = match words.next().as_deref() {
                    Some("high") => Priority::High,
                    Some("normal") => Priority::Normal,
                    Some("low") => Priority::Low,
                    _ => return Err("--priority high|normal|low".to_owned()),
                };
            }
            "--for" => {
                let seconds = words.next().and_then(|seconds| seconds.parse().ok());
                let seconds = seconds.ok_or("--for SECONDS: a whole number")?;
                run_for = Some(std::time::Duration::from_secs(seconds));
            }
            "--retry" => retry = true,
            "--pipes" => terminal = false,
            "--bg" => wait = Some(false),
            "--wait" => wait = Some(true),
            _ => return Err(USAGE.to_owned()),
        }
    }
    let argv: Vec<String> = words.collect();
    if argv.is_empty() {
        return Err(USAGE.to_owned());
    }
    let mut request = Request::argv(argv).priority(priority);
    if terminal {
        request = request.terminal(80, 24);
    }
    if let Some(time) = run_for {
        request = request.run_for(time);
    }
    if retry {
        request = request.retry();
    }
    Ok(Order::Run { agent, request, wait })
}

/// Splits into words as a shell does: `'...'` is as it is, in `"..."` and
/// outside `\` takes the next character as it is.
fn words(text: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None | Some('"'), '\\') => {
                let next = chars.next().ok_or("a `\\` at the end")?;
                word.get_or_insert_default().push(next);
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err("a quote is not closed".to_owned());
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_as_in_a_shell() {
        for (text, expected) in [
            ("  a  b ", vec!["a", "b"]),
            (r#"sh -c 'a "b" \c' "d 'e' \"f\"""#, vec!["sh", "-c", r#"a "b" \c"#, r#"d 'e' "f""#]),
            (r"a\ b '' x''y", vec!["a b", "", "xy"]),
        ] {
            assert_eq!(words(text).unwrap(), expected, "{text}");
        }
        assert!(words("'a").is_err());
    }

    #[test]
    fn an_order_says_what_is_wrong_with_it() {
        let run = Order::parse("run a1 --priority high --pipes --bg -- echo hi").unwrap().unwrap();
        let request = Request::argv(["echo", "hi"]).priority(Priority::High);
        assert_eq!(run, Order::Run { agent: "a1".into(), request, wait: Some(false) });
        assert_eq!(Order::parse("  # nothing").unwrap(), None);
        let input = Order::Input { command: "last".into(), text: "two  words".into() };
        assert_eq!(Order::parse("input last two  words").unwrap(), Some(input));
        for bad in ["fly", "run", "run a1 echo", "run a1 --", "watch", "watch a b", "search last"] {
            assert!(Order::parse(bad).is_err(), "{bad}");
        }
    }
}
