//! Lists in pages.
//!
//! A page token is the sort key of the last item that was given, so that
//! paging goes on at the right place whatever was added or removed meanwhile:
//! no item that is there all the time is given twice or left out.

use prost::Message;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Reason, Result};

/// Items of a page unless asked otherwise.
const DEFAULT_LIMIT: usize = 100;
/// Items of a page at most.
const MAX_LIMIT: usize = 1000;
/// Bytes of a page, more or less: clients take messages of 4 MiB by default.
const MAX_BYTES: usize = 3 << 20;
/// Tokens are short; longer ones are not ours.
const MAX_TOKEN: usize = 4096;

/// What a list is sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Order {
    NewestFirst,
    OldestFirst,
    NameUp,
    NameDown,
}

/// Sorts before or after others; the id tells equal ones apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Key {
    sort: String,
    id: String,
}

impl Key {
    pub fn time(millis: u64, id: &str) -> Self {
        Self { sort: format!("{millis:020}"), id: id.to_owned() }
    }

    pub fn name(name: &str, id: &str) -> Self {
        Self { sort: name.to_owned(), id: id.to_owned() }
    }
}

#[derive(Serialize, Deserialize)]
struct Token {
    order: Order,
    after: Key,
}

/// What the caller asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub order: Order,
    /// 0: the default.
    pub limit: u32,
    /// Empty: the first page.
    pub page: &'a str,
}

/// The page that was asked for, and the token of the next one, empty after
/// the last. Only what is on the page becomes a message.
pub(super) fn cut<T: Into<M>, M: Message>(
    mut items: Vec<(Key, T)>,
    wanted: Wanted<'_>,
) -> Result<(Vec<M>, String)> {
    let limit = match usize::try_from(wanted.limit) {
        Ok(0) => DEFAULT_LIMIT,
        Ok(limit) if limit <= MAX_LIMIT => limit,
        _ => {
            let message = format!("the limit {} is more than {MAX_LIMIT}", wanted.limit);
            return Err(Error::new(Reason::InvalidParameter, message).field("limit"));
        }
    };
    let descending = matches!(wanted.order, Order::NewestFirst | Order::NameDown);
    items.sort_by(|a, b| if descending { b.0.cmp(&a.0) } else { a.0.cmp(&b.0) });
    let after = decode(wanted)?;
    let is_before = |key: &Key| match &after {
        Some(after) if descending => key >= after,
        Some(after) => key <= after,
        None => false,
    };

    let mut page = Vec::new();
    let mut bytes = 0;
    let mut last = None;
    for (key, item) in items.into_iter().skip_while(|(key, _)| is_before(key)) {
        let item = item.into();
        bytes += item.encoded_len();
        if let Some(last) = last.take_if(|_| page.len() == limit || bytes > MAX_BYTES) {
            return Ok((page, encode(&Token { order: wanted.order, after: last })?));
        }
        page.push(item);
        last = Some(key);
    }
    Ok((page, String::new()))
}

fn encode(token: &Token) -> Result<String> {
    let json = serde_json::to_vec(token).map_err(|cause| {
        Error::new(Reason::Internal, "a page token cannot be made").because(cause)
    })?;
    Ok(json.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn decode(wanted: Wanted<'_>) -> Result<Option<Key>> {
    if wanted.page.is_empty() {
        return Ok(None);
    }
    let bytes: Option<Vec<u8>> = match wanted.page.len() <= MAX_TOKEN {
        true => wanted.page.as_bytes().chunks(2).map(hex_byte).collect(),
        false => None,
    };
    bytes
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .filter(|token: &Token| token.order == wanted.order)
        .map(|token| Some(token.after))
        .ok_or_else(|| {
            Error::new(Reason::InvalidParameter, "the page is not the next_page of such a list")
                .field("page")
                .advice("begin again without a page, or sort as for the page before")
        })
}

fn hex_byte(pair: &[u8]) -> Option<u8> {
    u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok().filter(|_| pair.len() == 2)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::pb;

    fn items(names: &[&str]) -> Vec<(Key, pb::Feature)> {
        let item = |name: &&str| {
            let feature = pb::Feature { name: (*name).into(), ..pb::Feature::default() };
            (Key::name(name, name), feature)
        };
        names.iter().map(item).collect()
    }

    fn page(names: &[&str], order: Order, limit: u32, page: &str) -> (Vec<String>, String) {
        let (items, next): (Vec<pb::Feature>, _) =
            cut(items(names), Wanted { order, limit, page }).unwrap();
        (items.into_iter().map(|feature| feature.name).collect(), next)
    }

    #[test]
    fn pages_go_on_where_they_ended_though_the_list_changed() {
        let (first, next) = page(&["b", "d", "a", "c"], Order::NameUp, 2, "");
        assert_eq!(first, ["a", "b"]);
        // The last one given is gone, one before it is new.
        let (second, next) = page(&["a", "aa", "c", "d"], Order::NameUp, 2, &next);
        assert_eq!(second, ["c", "d"]);
        assert_eq!(next, "");
    }

    #[test]
    fn the_other_direction() {
        let (first, next) = page(&["b", "d", "a", "c"], Order::NameDown, 3, "");
        assert_eq!(first, ["d", "c", "b"]);
        assert_eq!(page(&["b", "d", "a", "c"], Order::NameDown, 3, &next).0, ["a"]);
    }

    #[test]
    fn a_full_last_page_has_no_next() {
        assert_eq!(
            page(&["a", "b"], Order::NameUp, 2, ""),
            (vec!["a".into(), "b".into()], "".into())
        );
    }

    #[test]
    fn large_items_make_short_pages() {
        let big = "x".repeat(MAX_BYTES / 2 - 100);
        let items: Vec<_> = ["a", "b", "c"]
            .map(|id| {
                let feature = pb::Feature { details: big.clone(), ..pb::Feature::default() };
                (Key::name(id, id), feature)
            })
            .into();
        let wanted = Wanted { order: Order::NameUp, limit: 0, page: "" };
        let (first, next): (Vec<pb::Feature>, _) = cut(items.clone(), wanted).unwrap();
        assert_eq!(first.len(), 2);
        let wanted = Wanted { page: &next, ..wanted };
        let (second, next): (Vec<pb::Feature>, _) = cut(items, wanted).unwrap();
        assert_eq!((second.len(), next.as_str()), (1, ""));
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let (_, next) = page(&["a", "b"], Order::NameUp, 1, "");
        let long = "00".repeat(MAX_TOKEN);
        for (order, token) in [
            (Order::NameUp, "zz"),
            (Order::NameUp, "7b7"),
            (Order::NameUp, "ü"),
            (Order::NameUp, long.as_str()),
            (Order::NameDown, next.as_str()),
        ] {
            let wanted = Wanted { order, limit: 1, page: token };
            let error = cut::<_, pb::Feature>(items(&["a", "b"]), wanted).unwrap_err();
            assert_eq!(error.field_name(), Some("page"), "{token}");
        }
        let wanted = Wanted { order: Order::NameUp, limit: 1001, page: "" };
        let error = cut::<_, pb::Feature>(items(&["a"]), wanted).unwrap_err();
        assert_eq!(error.field_name(), Some("limit"));
    }

    #[test]
    fn only_the_page_becomes_messages() {
        struct Counted<'a>(&'a Cell<u32>);
        impl From<Counted<'_>> for pb::Feature {
            fn from(item: Counted<'_>) -> Self {
                item.0.set(item.0.get() + 1);
                Self::default()
            }
        }
        let made = Cell::new(0);
        let items = (0..1000).map(|n| (Key::time(n, "x"), Counted(&made))).collect();
        let wanted = Wanted { order: Order::NewestFirst, limit: 10, page: "" };
        let (page, next): (Vec<pb::Feature>, _) = cut(items, wanted).unwrap();
        assert!(page.len() == 10 && !next.is_empty());
        assert_eq!(made.get(), 11, "the page, and one to see that it is not the last");
    }
}
