//! The requests that wait for their answer: in order, bounded, each with an
//! end to the waiting.
//!
//! A request stays from the moment it is made until it is answered, expires
//! or is withdrawn, whatever happens to links in between. A new link is sent
//! everything that is unanswered again, in order and under the same ids, so
//! that whoever carried a request out already only repeats the answer.
//!
//! ```text
//!   first                      unsent            next number
//!     │ sent on this link        │ not yet           │
//!     ▼                          ▼                   ▼
//!     1    2    4    5    8      9    10    11
//!
//!   a new link: `unsent` goes back to the first
//!   refused for now: a request goes to the end, under its id
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use bytes::Bytes;
use trunkline_protocol::codec;
use trunkline_protocol::frame::Frame;
use trunkline_protocol::ids::RequestId;

/// How much an [`Outbox`] holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutboxLimits {
    /// Most requests. About 300 bytes each beside their content. 1,000.
    pub requests_max: usize,
    /// Most content, in bytes as JSON. 4 MiB.
    pub bytes_max: usize,
}

impl Default for OutboxLimits {
    fn default() -> Self {
        Self { requests_max: 1000, bytes_max: 4 * 1024 * 1024 }
    }
}

/// The outbox holds as much as it may: nothing was added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many requests wait for their answer")]
pub struct Full;

/// How several requests may travel as one `batch`, in a link's limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batching {
    /// Most requests in one.
    pub messages_max: usize,
    /// Longest batch, in bytes as JSON.
    pub bytes_max: usize,
}

/// A request that left the outbox unanswered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unanswered<K> {
    /// The request.
    pub id: RequestId,
    /// What the owner noted about it.
    pub note: K,
    /// Whether it was handed to a link: if not, it was surely not carried out.
    pub sent: bool,
}

#[derive(Debug)]
struct Waiting<K> {
    id: RequestId,
    json: Bytes,
    note: K,
    until: Option<Duration>,
    /// It has been on a link.
    sent: bool,
}

/// Around the messages of a batch, in bytes: rather too many than too few.
const BATCH_BYTES: usize = 64;

/// Requests without an answer, in the order in which they were made. With
/// each goes a note `K`: what its owner wants to know when it ends.
#[derive(Debug)]
pub struct Outbox<K> {
    limits: OutboxLimits,
    waiting: BTreeMap<u64, Waiting<K>>,
    by_id: HashMap<RequestId, u64>,
    by_time: BTreeSet<(Duration, u64)>,
    bytes: usize,
    /// The number of the next request made.
    next: u64,
    /// Numbers from here on are not sent yet on this link.
    unsent: u64,
}

impl<K> Outbox<K> {
    /// An empty outbox.
    pub fn new(limits: OutboxLimits) -> Self {
        Self {
            limits,
            waiting: BTreeMap::new(),
            by_id: HashMap::new(),
            by_time: BTreeSet::new(),
            bytes: 0,
            next: 0,
            unsent: 0,
        }
    }

    /// How many requests wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Adds a request, encoded as `json`, that waits no longer than `until`
    /// (for ever if `None`).
    pub fn push(
        &mut self,
        id: RequestId,
        json: Bytes,
        note: K,
        until: Option<Duration>,
    ) -> Result<(), Full> {
        let fits = self.waiting.len() < self.limits.requests_max
            && self.bytes + json.len() <= self.limits.bytes_max;
        if !fits {
            return Err(Full);
        }
        let number = self.next;
        self.next += 1;
        self.bytes += json.len();
        self.by_id.insert(id.clone(), number);
        if let Some(until) = until {
            self.by_time.insert((until, number));
        }
        self.waiting.insert(number, Waiting { id, json, note, until, sent: false });
        Ok(())
    }

    /// A link came up, or the last one is gone: everything is to be sent
    /// again.
    pub fn handle_link(&mut self) {
        self.unsent = 0;
    }

    /// The hub was asked too often: the request is to be sent again, after
    /// those that wait already. Whether it waits at all.
    pub fn send_again(&mut self, id: &RequestId) -> bool {
        let Some(number) = self.by_id.get(id).copied() else { return false };
        let Some(waiting) = self.waiting.remove(&number) else { return false };
        let next = self.next;
        self.next += 1;
        if let Some(until) = waiting.until {
            self.by_time.remove(&(until, number));
            self.by_time.insert((until, next));
        }
        self.by_id.insert(id.clone(), next);
        self.waiting.insert(next, waiting);
        true
    }

    /// Whether something is to be sent.
    pub fn has_unsent(&self) -> bool {
        self.waiting.range(self.unsent..).next().is_some()
    }

    /// Whether a request waits of which `is_it` is true.
    pub fn has(&self, mut is_it: impl FnMut(&K) -> bool) -> bool {
        self.waiting.values().any(|waiting| is_it(&waiting.note))
    }

    /// An answer came. Gives back the note, or `None` for an answer that
    /// nobody waits for any more: a duplicate, or too late.
    pub fn handle_answer(&mut self, id: &RequestId) -> Option<K> {
        let number = *self.by_id.get(id)?;
        self.remove(number).map(|unanswered| unanswered.note)
    }

    /// Takes out every request that `pick` picks, in order. It is shown the
    /// note and whether the request was handed to a link.
    pub fn withdraw(&mut self, mut pick: impl FnMut(&K, bool) -> bool) -> Vec<Unanswered<K>> {
        let picked = |(&number, waiting): (&u64, &Waiting<K>)| {
            pick(&waiting.note, waiting.sent).then_some(number)
        };
        let numbers: Vec<u64> = self.waiting.iter().filter_map(picked).collect();
        numbers.into_iter().filter_map(|number| self.remove(number)).collect()
    }

    /// The end of the first request's patience.
    pub fn deadline(&self) -> Option<Duration> {
        self.by_time.first().map(|(until, _)| *until)
    }

    /// Takes out the next request whose patience has ended.
    pub fn poll_expired(&mut self, now: Duration) -> Option<Unanswered<K>> {
        let (until, number) = *self.by_time.first()?;
        if until > now {
            return None;
        }
        self.remove(number)
    }

    /// The next frame for the link: one request, or several as a batch where
    /// that is agreed; and how many.
    pub fn poll(&mut self, batching: Option<Batching>) -> Option<(Frame, usize)> {
        let Batching { messages_max, bytes_max } =
            batching.unwrap_or(Batching { messages_max: 1, bytes_max: 0 });
        let mut gathered: Vec<&Bytes> = Vec::new();
        let mut bytes = BATCH_BYTES;
        for (&number, waiting) in self.waiting.range_mut(self.unsent..) {
            bytes += waiting.json.len() + 1;
            let fits = gathered.len() < messages_max && bytes <= bytes_max;
            if !gathered.is_empty() && !fits {
                break;
            }
            waiting.sent = true;
            gathered.push(&waiting.json);
            self.unsent = number + 1;
        }
        let count = gathered.len();
        let frame = match gathered.as_slice() {
            [] => return None,
            [one] => Frame::Text(Bytes::clone(one)),
            several => codec::batch(several.iter().copied()),
        };
        Some((frame, count))
    }

    fn remove(&mut self, number: u64) -> Option<Unanswered<K>> {
        let Waiting { id, json, note, until, sent } = self.waiting.remove(&number)?;
        self.bytes -= json.len();
        self.by_id.remove(&id);
        if let Some(until) = until {
            self.by_time.remove(&(until, number));
        }
        Some(Unanswered { id, note, sent })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn a_new_link_gets_what_is_unanswered_again_in_order() {
        let mut outbox = outbox();
        push(&mut outbox, "abc");
        assert_eq!(sent(&mut outbox), ["a", "b", "c"]);
        assert_eq!(outbox.handle_answer(&id("b")), Some('b'));
        push(&mut outbox, "d");
        outbox.handle_link();
        push(&mut outbox, "e");
        assert_eq!(sent(&mut outbox), ["a", "c", "d", "e"]);
        assert_eq!(sent(&mut outbox), [""; 0]);
    }

    #[test]
    fn an_answer_counts_once() {
        let mut outbox = outbox();
        push(&mut outbox, "a");
        assert_eq!(outbox.handle_answer(&id("a")), Some('a'));
        assert_eq!(outbox.handle_answer(&id("a")), None);
        assert_eq!((outbox.len(), outbox.bytes), (0, 0));
    }

    #[test]
    fn a_full_outbox_says_so_and_takes_nothing() {
        let mut outbox = Outbox::new(OutboxLimits { requests_max: 2, bytes_max: 3 });
        let mut add = |name: &str, json: &'static str| {
            outbox.push(id(name), Bytes::from_static(json.as_bytes()), (), None)
        };
        assert_eq!(add("a", "12"), Ok(()));
        assert_eq!(add("b", "34"), Err(Full), "too many bytes");
        assert_eq!(add("c", "3"), Ok(()));
        assert_eq!(add("d", ""), Err(Full), "too many requests");
        assert_eq!(outbox.len(), 2);
    }

    #[test]
    fn patience_ends_on_time_and_tells_what_was_never_sent() {
        let mut outbox = outbox();
        outbox.push(id("a"), Bytes::from_static(b"a"), 'a', Some(3 * S)).unwrap();
        assert_eq!(sent(&mut outbox), ["a"]);
        outbox.handle_link();
        outbox.push(id("b"), Bytes::from_static(b"b"), 'b', Some(2 * S)).unwrap();
        outbox.push(id("c"), Bytes::from_static(b"c"), 'c', None).unwrap();
        assert_eq!(outbox.deadline(), Some(2 * S));
        assert_eq!(outbox.poll_expired(S), None);
        let b = outbox.poll_expired(5 * S).unwrap();
        let a = outbox.poll_expired(5 * S).unwrap();
        assert_eq!((b.note, b.sent), ('b', false));
        assert_eq!((a.note, a.sent), ('a', true), "on an earlier link");
        assert_eq!((outbox.poll_expired(5 * S), outbox.deadline()), (None, None));
        assert_eq!(outbox.len(), 1, "c waits for ever");
    }

    #[test]
    fn what_is_refused_for_now_goes_to_the_end_and_stays_known_as_sent() {
        let mut outbox = outbox();
        outbox.push(id("a"), Bytes::from_static(b"a"), 'a', Some(S)).unwrap();
        push(&mut outbox, "bc");
        assert_eq!(sent(&mut outbox), ["a", "b", "c"]);
        assert!(!outbox.has_unsent());
        assert!(outbox.send_again(&id("a")));
        assert!(!outbox.send_again(&id("x")));
        assert!(outbox.has_unsent());
        assert_eq!(sent(&mut outbox), ["a"]);
        outbox.handle_link();
        assert_eq!(sent(&mut outbox), ["b", "c", "a"]);
        assert!(outbox.send_again(&id("a")));
        assert!(outbox.poll_expired(S).unwrap().sent);
        assert_eq!((outbox.len(), outbox.deadline()), (2, None));
    }

    #[test]
    fn batches_keep_to_both_limits() {
        let mut outbox = outbox();
        push(&mut outbox, "abcdefg");
        let three = Batching { messages_max: 3, bytes_max: 1000 };
        let (frame, count) = outbox.poll(Some(three)).unwrap();
        assert!(text(&frame).contains("[a,b,c]"));
        assert_eq!(count, 3);
        let short = Batching { messages_max: 3, bytes_max: BATCH_BYTES + 4 };
        let (frame, _) = outbox.poll(Some(short)).unwrap();
        assert!(text(&frame).contains("[d,e]"), "{}", text(&frame));
        assert!(frame.len() <= short.bytes_max);
        let tiny = Batching { messages_max: 3, bytes_max: 1 };
        assert_eq!(text(&outbox.poll(Some(tiny)).unwrap().0), "f", "what fits no batch goes alone");
    }

    fn outbox() -> Outbox<char> {
        Outbox::new(OutboxLimits::default())
    }

    fn id(name: &str) -> RequestId {
        name.parse().unwrap()
    }

    fn push(outbox: &mut Outbox<char>, names: &str) {
        for name in names.chars() {
            let json = Bytes::from(name.to_string());
            outbox.push(id(&name.to_string()), json, name, None).unwrap();
        }
    }

    fn sent(outbox: &mut Outbox<char>) -> Vec<String> {
        std::iter::from_fn(|| outbox.poll(None)).map(|(frame, _)| text(&frame)).collect()
    }

    fn text(frame: &Frame) -> String {
        match frame {
            Frame::Text(json) => String::from_utf8(json.to_vec()).unwrap(),
            Frame::Binary(_) | Frame::Close(_) => panic!("not text: {frame:?}"),
        }
    }
}
