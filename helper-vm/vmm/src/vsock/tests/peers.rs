//! Property tests: users and a well-behaved guest do anything in any order.
//!
//! [`World`] itself asserts that bytes arrive in order and intact, that nobody's credit is passed and that
//! nothing is sent after its end. Here: what must have arrived has, and every connection ends.

use proptest::prelude::*;

use super::peer::{Pair, World};
use crate::vsock::packet::Directions;

#[derive(Clone, Debug)]
enum Step {
    HostConnects { accepted: bool, buf_alloc: u32 },
    GuestConnects { buf_alloc: u32 },
    UserWrites(u32, usize),
    UserReads(u32, usize),
    UserShutsWrite(u32),
    UserCloses(u32),
    GuestSends(u32, usize),
    GuestReads(u32, usize),
    GuestShuts(u32, Directions),
    GuestResets(u32),
    Deliver { count: usize, space: usize },
    Poll,
}

fn buffer() -> impl Strategy<Value = u32> {
    prop_oneof![Just(100), 1_u32..5000, Just(65_536), Just(262_144)]
}

fn length() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 1_usize..100, 3 => 1_usize..10_000, 2 => Just(65_536_usize), 1 => 1_usize..400_000]
}

fn id() -> impl Strategy<Value = u32> {
    1_u32..6
}

/// Steps that move bytes, with `Deliver` and `Poll` often enough that something happens.
fn transfer() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (id(), length()).prop_map(|(id, n)| Step::UserWrites(id, n)),
        3 => (id(), length()).prop_map(|(id, n)| Step::UserReads(id, n)),
        3 => (id(), length()).prop_map(|(id, n)| Step::GuestSends(id, n)),
        3 => (id(), length()).prop_map(|(id, n)| Step::GuestReads(id, n)),
        4 => (1_usize..40, prop_oneof![0_usize..10, Just(3700_usize), Just(65_536_usize)])
            .prop_map(|(count, space)| Step::Deliver { count, space }),
        4 => Just(Step::Poll),
    ]
}

fn connects() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => buffer().prop_map(|buf_alloc| Step::HostConnects { accepted: true, buf_alloc }),
        1 => buffer().prop_map(|buf_alloc| Step::HostConnects { accepted: false, buf_alloc }),
        3 => buffer().prop_map(|buf_alloc| Step::GuestConnects { buf_alloc }),
    ]
}

fn ends() -> impl Strategy<Value = Step> {
    prop_oneof![
        id().prop_map(Step::UserShutsWrite),
        id().prop_map(Step::UserCloses),
        (id(), prop_oneof![Just(Directions::SEND), Just(Directions::RECEIVE), Just(Directions::BOTH)])
            .prop_map(|(id, directions)| Step::GuestShuts(id, directions)),
        id().prop_map(Step::GuestResets),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![1 => connects(), 12 => transfer(), 1 => ends()];
    (connects(), proptest::collection::vec(step, 1..120)).prop_map(|(first, mut rest)| {
        rest.insert(0, first);
        rest
    })
}

fn run(world: &mut World, steps: &[Step]) {
    for step in steps {
        match *step {
            Step::HostConnects { accepted, buf_alloc } => {
                (world.policy.accepts, world.policy.buf_alloc) = (accepted, buf_alloc);
                world.host_connects();
            }
            Step::GuestConnects { buf_alloc } => {
                world.guest_connects(buf_alloc);
            }
            Step::UserWrites(id, n) => world.user_writes(id, n),
            Step::UserReads(id, n) => {
                world.user_reads(id, n);
            }
            Step::UserShutsWrite(id) => world.user_shuts_write(id),
            Step::UserCloses(id) => world.user_closes(id),
            Step::GuestSends(id, n) => world.guest_sends(id, n),
            Step::GuestReads(id, n) => {
                world.guest_reads(id, n);
            }
            Step::GuestShuts(id, directions) => world.guest_shuts(id, directions),
            Step::GuestResets(id) => world.guest_resets(id),
            Step::Deliver { count, space } => {
                world.deliver(count, space);
            }
            Step::Poll => world.poll(),
        }
    }
}

/// What holds once everybody has read everything.
fn check_complete(id: u32, pair: &Pair) {
    let Pair { guest, user } = pair;
    assert!(!user.waits() || user.stream.is_none(), "the connect of {id} got no answer");
    if user.stream.is_some() {
        assert_eq!(
            user.read_total, guest.sent_total,
            "the user of {id} has not read all that the guest sent"
        );
        let over = guest.told.has(Directions::SEND) || guest.reset || user.refused;
        assert_eq!(user.eof, over, "end of file of {id}");
    }
    if guest.open && !guest.told.has(Directions::RECEIVE) {
        assert_eq!(guest.read_total, user.sent_total, "the guest has not read all that {id}'s user sent");
        let over = user.shut_write || user.stream.is_none();
        assert_eq!(guest.host_told.has(Directions::SEND), over, "the guest's end of file of {id}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn bytes_arrive_whole_and_every_connection_ends(steps in steps()) {
        let mut world = World::new();
        run(&mut world, &steps);
        world.policy.accepts = true;
        world.settle();
        world.pairs.iter().for_each(|(id, pair)| check_complete(*id, pair));
        let ids: Vec<u32> = world.pairs.keys().copied().collect();
        ids.iter().for_each(|id| world.user_closes(*id));
        world.settle();
        prop_assert_eq!(world.mux.live(), 0);
    }

    #[test]
    fn connections_end_though_the_guest_never_answers_a_close(steps in steps()) {
        let mut world = World::new();
        world.policy.answers_close = false;
        run(&mut world, &steps);
        let ids: Vec<u32> = world.pairs.keys().copied().collect();
        ids.iter().for_each(|id| world.user_closes(*id));
        world.settle();
        world.pass_time(1);
        world.pass_time(7);
        let lingering = world.mux.live();
        world.pass_time(1);
        world.settle();
        prop_assert_eq!(world.mux.live(), 0, "{} lingered", lingering);
        prop_assert!(!world.mux.lingers());
    }
}
