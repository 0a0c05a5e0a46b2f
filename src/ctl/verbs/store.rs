//! `imagectl store`.

use super::Session;
use crate::{
    ctl::{
        args::{Output, StoreVerb},
        exit::Exit,
        failure::Failure,
        render::{json, table},
    },
    pb,
};

pub(super) async fn run(mut session: Session<'_, '_>, verb: StoreVerb) -> Result<(), Failure> {
    let client = session.client.clone();
    match verb {
        StoreVerb::List => {
            let request = pb::ListStoresRequest {};
            let stores = client.call(client.stores().list_stores(request)).await?.items;
            session.print(
                || json::document(json::stores(&stores), []),
                |_, width| table::stores(&stores, width),
            )
        }
        StoreVerb::Check { name } => {
            let request = pb::CheckStoreRequest { name: name.clone() };
            let steps = client.call(client.stores().check_store(request)).await?.steps;
            let bad = steps.iter().find(|step| !step.problem.is_empty());
            let problem = bad.map(|step| step.problem.clone());
            session.print(
                || json::document(json::steps(&steps), []),
                |_, width| table::steps(&steps, width),
            )?;
            match problem {
                None => Ok(()),
                Some(problem) => {
                    let context = format!("the store {name:?} cannot be used");
                    Err(Failure::new(Exit::Failed, context).report(&problem))
                }
            }
        }
        StoreVerb::Gc { name } => {
            let request = pb::CollectGarbageRequest { name };
            let uploads = client.call(client.stores().collect_garbage(request)).await?.uploads;
            match session.output {
                Output::Json => session.console.print(&json::document(json::garbage(uploads), [])),
                Output::Table => {
                    let noun = if uploads == 1 { "upload" } else { "uploads" };
                    session.console.print(&format!("removed {uploads} dead {noun}"))
                }
            }
        }
    }
}
