//! That a flow's memory is bounded, seen from inside.

use super::super::names::{Kind, Name};
use super::*;
use crate::kernel::Gva;
use crate::ring::record::{Call, TraceFlags};

struct Nameless;

impl Names for Nameless {
    fn function(&self, _: u32, _: Gva) -> Name<'_> {
        Name {
            symbol: None,
            module: None,
            kind: Kind::Kernel,
            irq_entry: false,
            told: None,
        }
    }
}

/// Every pid, function and depth there is, and calls that never return, on
/// CPUs that fall silent.
#[test]
fn memory_is_bounded_whatever_the_items_are() {
    let limits = Limits {
        tasks: 64,
        depth: 8,
        pending: 32,
        roots: 16,
    };
    let mut flow = Flow::new(&Nameless, limits);
    let (mut told, mut most) = (0u64, 0);
    let mut random = 1u64;
    for time in 0..200_000 {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let call = Call {
            task: Task {
                pid: (random >> 20) as i32,
                comm: None,
            },
            flags: TraceFlags((random >> 56) as u8),
            func: Gva(random >> 9 & 0xffff),
            caller: Gva(random),
            depth: (random >> 40) as u16 % 10,
            epoch: random,
            seq: time,
        };
        let cpu = (random >> 33) as u16 % 500;
        flow.push(&Item {
            cpu,
            boot: 1 + (time / 50_000) as u32,
            time,
            what: What::Call(call),
        });
        told += std::iter::from_fn(|| flow.pop()).count() as u64;
        most = most.max(flow.out.len());
        assert!(flow.out.len() <= limits.pending);
    }
    let (stacks, frames) = flow.tasks.size();
    assert!(
        stacks == limits.tasks && frames <= limits.tasks * 16,
        "{stacks}, {frames}"
    );
    assert!(flow.roots.len() <= limits.roots && flow.cpus.len() <= 500);
    assert_eq!(most, limits.pending, "the test reaches the limit");
    assert!(told > 200_000);
}

/// Interrupts may stand on a call of their own depth, but not on each other.
#[test]
fn calls_of_one_depth_do_not_pile_up() {
    let mut flow = Flow::new(&Nameless, Limits::default());
    for time in 0..1_000 {
        let call = Call {
            task: Task { pid: 1, comm: None },
            flags: TraceFlags(TraceFlags::IRQS_OFF),
            func: Gva(time),
            caller: Gva(0),
            depth: 3,
            epoch: 1,
            seq: time,
        };
        flow.push(&Item {
            cpu: 0,
            boot: 1,
            time,
            what: What::Call(call),
        });
        assert!(flow.tasks.size().1 <= 4);
    }
}
