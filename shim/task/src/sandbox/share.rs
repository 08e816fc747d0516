//! One plan, two readers: what the share daemon serves and where the agent finds it. The names agree here
//! and nowhere else.

use vmctr_fileshare::share::{ShareSpec, Top, Volume as ShareVolume};
use vmctr_images::root::{RootPlan, Upper};
use vmctr_proto::agent::{GuestUpper, HostUpper, Overlay, Root, overlay, root};
use vmctr_proto::control;

use crate::oci::Volume;

/// What the daemon is to serve.
pub fn share_spec(plan: &RootPlan, volumes: &[Volume]) -> ShareSpec {
    let (lowers, top) = match plan {
        RootPlan::Folder { path, read_only } => {
            (vec![], Top::Folder { path: path.clone(), read_only: *read_only })
        }
        RootPlan::Union { lowers, upper } => (lowers.clone(), share_top(upper)),
    };
    let volumes = volumes.iter().map(|volume| ShareVolume {
        source: volume.source.clone(),
        read_only: volume.read_only,
        recursive: volume.recursive,
    });
    ShareSpec { lowers, top, volumes: volumes.collect(), ..ShareSpec::new() }
}

fn share_top(upper: &Upper) -> Top {
    match upper {
        Upper::None | Upper::Guest => Top::None,
        Upper::Host { upper, work } => Top::Overlay { upper: upper.clone(), work: work.clone() },
    }
}

/// The root as the agent is told of it.
pub fn guest_root(plan: &RootPlan) -> Root {
    let kind = match plan {
        RootPlan::Folder { .. } => root::Kind::Folder("root".into()),
        RootPlan::Union { lowers, upper } => root::Kind::Overlay(Overlay {
            lowers: (0..lowers.len()).map(|index| format!("lower/{index}")).collect(),
            upper: guest_upper(upper),
        }),
    };
    Root { kind: Some(kind) }
}

fn guest_upper(upper: &Upper) -> Option<overlay::Upper> {
    match upper {
        Upper::None => None,
        // The size is the kernel's choice: half of the guest's memory.
        Upper::Guest => Some(overlay::Upper::Guest(GuestUpper { size_bytes: 0 })),
        Upper::Host { .. } => {
            Some(overlay::Upper::Host(HostUpper { upper: "upper".into(), work: "work".into() }))
        }
    }
}

/// The share as users inspect it.
pub fn describe(spec: &ShareSpec) -> Vec<control::Share> {
    let share = |name: String, source: &std::path::Path, read_only| control::Share {
        name,
        source: source.display().to_string(),
        read_only,
    };
    let mut shares: Vec<_> =
        spec.lowers.iter().enumerate().map(|(n, path)| share(format!("lower/{n}"), path, true)).collect();
    match &spec.top {
        Top::None => {}
        Top::Overlay { upper, work } => {
            shares.extend([share("upper".into(), upper, false), share("work".into(), work, false)]);
        }
        Top::Folder { path, read_only } => shares.push(share("root".into(), path, *read_only)),
    }
    let volumes = spec.volumes.iter().enumerate();
    shares.extend(volumes.map(|(n, volume)| share(format!("vol/{n}"), &volume.source, volume.read_only)));
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn daemon_and_agent_get_the_same_names_in_the_same_order() {
        let plan = RootPlan::Union {
            lowers: vec!["/top".into(), "/base".into()],
            upper: Upper::Host { upper: "/u".into(), work: "/w".into() },
        };
        let volumes = [Volume { source: "/v".into(), read_only: true, recursive: true }];
        let spec = share_spec(&plan, &volumes);
        spec.validate().unwrap();
        let names: Vec<_> = describe(&spec).into_iter().map(|share| (share.name, share.source)).collect();
        let want =
            [("lower/0", "/top"), ("lower/1", "/base"), ("upper", "/u"), ("work", "/w"), ("vol/0", "/v")];
        assert_eq!(names, want.map(|(name, source)| (name.to_owned(), source.to_owned())));
        let Some(root::Kind::Overlay(overlay)) = guest_root(&plan).kind else { panic!("no overlay") };
        assert_eq!(overlay.lowers, ["lower/0", "lower/1"]);
        assert!(matches!(overlay.upper, Some(overlay::Upper::Host(_))));
    }

    #[test]
    fn an_upper_in_the_guest_shares_nothing_writable() {
        let plan = RootPlan::Union { lowers: vec!["/base".into()], upper: Upper::Guest };
        let spec = share_spec(&plan, &[]);
        assert!(describe(&spec).iter().all(|share| share.read_only));
    }
}
