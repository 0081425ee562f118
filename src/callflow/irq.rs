//! Which of a task's calls interrupts made.
//!
//! An interrupt that arrives inside a traced call continues the depth of the
//! task it interrupts. Three signs tell it: its function lies in the kernel's
//! interrupt entry text, which is what stock function_graph goes by; or it was
//! called from interrupt entry code, which since 5.8 is not traced itself on x86
//! (noinstr); or the flags of its records say so.

use crate::ring::record::TraceFlags;

/// The interrupt that a task is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Irq {
    /// The depth of its first call.
    depth: u16,
    sign: Sign,
}

/// How an interrupt was noticed, and with it when it is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sign {
    /// By its function: when that returns.
    Function,
    /// By who called it: when something else is called at its depth.
    Caller,
    /// By its records' flags: when they are gone.
    Flags,
}

/// A record, as far as interrupts go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record {
    /// A call.
    Call {
        /// Of a function in interrupt entry text.
        of_entry: bool,
        /// From interrupt entry code.
        from_entry: bool,
    },
    /// A return.
    Return {
        /// Whether the call that it ends was made by an interrupt.
        of_interrupt: Option<bool>,
    },
}

/// What a record changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    /// The interrupt was over before it.
    pub(super) left: bool,
    /// It is the first one of an interrupt.
    pub(super) entered: bool,
}

impl Irq {
    /// Notices what a record at `depth` tells of `irq`, the interrupt that its
    /// task is in.
    pub(super) fn before(
        irq: &mut Option<Self>,
        depth: u16,
        flags: TraceFlags,
        record: Record,
    ) -> Change {
        let flagged = flags.hardirq() || flags.nmi();
        let left = irq
            .take_if(|irq| match (record, irq.sign) {
                _ if depth < irq.depth => true,
                (
                    Record::Return {
                        of_interrupt: Some(false),
                    },
                    _,
                ) => true,
                (_, Sign::Flags) => !flagged,
                (Record::Return { .. }, _) => false,
                (Record::Call { .. }, Sign::Function) => depth == irq.depth,
                (Record::Call { from_entry, .. }, Sign::Caller) => {
                    depth == irq.depth && !from_entry && !flagged
                }
            })
            .is_some();
        let sign = match record {
            Record::Call { of_entry: true, .. } => Some(Sign::Function),
            Record::Call {
                from_entry: true, ..
            } => Some(Sign::Caller),
            Record::Call { .. } if flagged => Some(Sign::Flags),
            _ => None,
        };
        let entered = irq.is_none() && sign.is_some();
        if entered {
            *irq = sign.map(|sign| Self { depth, sign });
        }
        Change { left, entered }
    }

    /// Notices what a return from `depth` ends; true if the interrupt. The
    /// return of a root ends it in any case: what the task does next outside
    /// traced calls is not seen.
    pub(super) fn after(irq: &mut Option<Self>, depth: u16) -> bool {
        let over =
            |irq: &mut Self| depth == irq.depth && (irq.sign == Sign::Function || depth == 0);
        irq.take_if(over).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ON: TraceFlags = TraceFlags(TraceFlags::HARDIRQ);
    const OFF: TraceFlags = TraceFlags(TraceFlags::SOFTIRQ);
    const NONE: Change = Change {
        left: false,
        entered: false,
    };
    const LEFT: Change = Change {
        left: true,
        entered: false,
    };
    const ENTERED: Change = Change {
        left: false,
        entered: true,
    };

    const CALL: Record = Record::Call {
        of_entry: false,
        from_entry: false,
    };
    const OF_ENTRY: Record = Record::Call {
        of_entry: true,
        from_entry: false,
    };
    const FROM_ENTRY: Record = Record::Call {
        of_entry: false,
        from_entry: true,
    };
    const RETURN: Record = Record::Return {
        of_interrupt: Some(true),
    };
    const INTERRUPTED: Record = Record::Return {
        of_interrupt: Some(false),
    };

    #[test]
    fn by_function_it_lasts_until_that_returns() {
        let mut irq = None;
        assert_eq!(Irq::before(&mut irq, 1, OFF, OF_ENTRY), ENTERED);
        assert_eq!(Irq::before(&mut irq, 2, ON, CALL), NONE);
        assert_eq!(Irq::before(&mut irq, 2, OFF, RETURN), NONE);
        assert!(!Irq::after(&mut irq, 2));
        assert_eq!(Irq::before(&mut irq, 1, OFF, RETURN), NONE);
        assert!(Irq::after(&mut irq, 1));
        assert_eq!(irq, None);
    }

    #[test]
    fn by_caller_it_lasts_until_another_calls() {
        let mut irq = None;
        // irq_enter_rcu, the handler, irq_exit_rcu; softirqs below the last.
        assert_eq!(Irq::before(&mut irq, 2, OFF, FROM_ENTRY), ENTERED);
        assert!(!Irq::after(&mut irq, 2));
        assert_eq!(Irq::before(&mut irq, 2, ON, FROM_ENTRY), NONE);
        assert_eq!(Irq::before(&mut irq, 2, OFF, FROM_ENTRY), NONE);
        assert_eq!(Irq::before(&mut irq, 3, OFF, CALL), NONE);
        assert_eq!(Irq::before(&mut irq, 2, OFF, RETURN), NONE);
        assert_eq!(Irq::before(&mut irq, 2, OFF, CALL), LEFT);
    }

    #[test]
    fn by_flags_it_lasts_until_they_go() {
        for flag in [TraceFlags::HARDIRQ, TraceFlags::NMI] {
            let mut irq = None;
            assert_eq!(Irq::before(&mut irq, 3, TraceFlags(flag), CALL), ENTERED);
            assert_eq!(Irq::before(&mut irq, 3, TraceFlags(flag), RETURN), NONE);
            assert!(!Irq::after(&mut irq, 3));
            assert_eq!(Irq::before(&mut irq, 3, OFF, CALL), LEFT);
        }
    }

    #[test]
    fn a_record_of_the_interrupted_call_ends_it() {
        let mut irq = None;
        Irq::before(&mut irq, 3, ON, CALL);
        assert_eq!(Irq::before(&mut irq, 2, ON, RETURN), LEFT);
        // It came while a return from depth 3 was on its way.
        Irq::before(&mut irq, 3, ON, FROM_ENTRY);
        assert_eq!(Irq::before(&mut irq, 3, ON, INTERRUPTED), LEFT);
        Irq::before(&mut irq, 3, OFF, OF_ENTRY);
        let both = Change {
            left: true,
            entered: true,
        };
        assert_eq!(Irq::before(&mut irq, 3, OFF, OF_ENTRY), both);
    }

    #[test]
    fn a_root_in_an_interrupt_ends_with_it() {
        let mut irq = None;
        assert_eq!(Irq::before(&mut irq, 0, ON, CALL), ENTERED);
        assert!(Irq::after(&mut irq, 0));
    }
}
