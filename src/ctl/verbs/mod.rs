//! What each verb asks of imaged, by noun.

mod export;
mod host;
mod image;
mod instance;
mod long;
mod new_file;
mod store;
mod volume;
mod work_request;

use std::{future::Future, time::SystemTime};

use super::{
    args::{Noun, Output, Paging},
    client::Client,
    console::Console,
    failure::Failure,
};
use crate::model::Timestamp;

pub(super) use image::confirm;
pub(super) use volume::confirm as confirm_volume;

/// What every verb has at hand.
pub(super) struct Session<'s, 'c> {
    pub client: Client,
    pub output: Output,
    pub console: &'s mut Console<'c>,
}

impl Session<'_, '_> {
    /// Prints one form of a result.
    fn print(
        &mut self,
        json: impl FnOnce() -> String,
        table: impl FnOnce(Timestamp, Option<u16>) -> String,
    ) -> Result<(), Failure> {
        let text = match self.output {
            Output::Json => json(),
            Output::Table => table(SystemTime::now().into(), self.console.width),
        };
        self.console.print(&text)
    }

    /// Prints a list; an empty one says so to people.
    fn print_list<T>(
        &mut self,
        page: &Page<T>,
        what: &str,
        json: impl FnOnce(&[T]) -> String,
        table: impl FnOnce(&[T], Timestamp, Option<u16>) -> String,
    ) -> Result<(), Failure> {
        if self.output == Output::Table && page.items.is_empty() {
            self.console.tell(&format!("no {what}"));
            return Ok(());
        }
        self.print(|| json(&page.items), |now, width| table(&page.items, now, width))?;
        if self.output == Output::Table && !page.next.is_empty() {
            self.console.tell(&format!("there are more: --all, or --page {}", page.next));
        }
        Ok(())
    }
}

/// A list, or the beginning of one.
struct Page<T> {
    items: Vec<T>,
    next: String,
}

/// Items to ask for at once when all are wanted: the most that imaged gives.
const FULL_PAGE: u32 = 1000;

/// Asks for one page, or for all of them. `get` takes limit and page.
async fn pages<T, F>(
    paging: Paging,
    mut get: impl FnMut(u32, String) -> F,
) -> Result<Page<T>, Failure>
where
    F: Future<Output = Result<Page<T>, Failure>>,
{
    if !paging.all {
        return get(paging.limit.unwrap_or_default(), paging.page.unwrap_or_default()).await;
    }
    let mut all = get(FULL_PAGE, String::new()).await?;
    // A page that names itself as the next would never end.
    let mut asked = String::new();
    while !all.next.is_empty() && all.next != asked {
        asked.clone_from(&all.next);
        let page = get(FULL_PAGE, asked.clone()).await?;
        all.items.extend(page.items);
        all.next = page.next;
    }
    Ok(all)
}

/// Does what `noun` says.
pub(super) async fn run(session: Session<'_, '_>, noun: Noun) -> Result<(), Failure> {
    match noun {
        Noun::Instance(verb) => instance::run(session, verb).await,
        Noun::Image(verb) => image::run(session, verb).await,
        Noun::WorkRequest(verb) => work_request::run(session, verb).await,
        Noun::Host(verb) => host::run(session, verb).await,
        Noun::Store(verb) => store::run(session, verb).await,
        Noun::Volume(verb) => volume::run(session, verb).await,
        // Done before there is a session.
        Noun::Completions { .. } | Noun::Man { .. } => Ok(()),
    }
}
