// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A guest that forges: writes one record into Ftrace's ring buffer itself, on
 * the CPU on which the module is loaded. Harmless but for that record.
 *
 *	insmod xf_forge.ko how=HOW control=0xADDRESS seq=0xADDRESS
 *
 * The addresses are those of xftrace_control and xftrace_seq in /proc/kallsyms.
 * HOW says what is wrong with the record:
 *
 *	plain		the kernel's own function-graph record, not keyed
 *	nokey		keyed by its type, plain by its addresses
 *	unknown		names an epoch that there never was
 *	stale		right in all, but 30 epochs old
 *	replayed	right in all, with a number that was used before
 *	depth		right in all, but nested deeper than there is
 *	cut		a keyed record of which the end is missing
 *	ahead		right in all, with a number 1000 ahead
 *	good		right in all, and counted: what Push_Raw would have made
 *	warn		no record; a warning in the kernel's log instead
 */
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/ring_buffer.h>
#include <linux/sched.h>
#include <linux/trace_events.h>
#include <linux/version.h>
#include <linux/xftrace.h>

/* How many records further a number "ahead" is, and how old a key "stale" */
#define AHEAD	1000
#define OLD	30

static char *how = "nokey";
module_param(how, charp, 0400);
static unsigned long control;
module_param(control, ulong, 0400);
static unsigned long seq;
module_param(seq, ulong, 0400);

/* As struct xftrace_call_entry in kernel/trace/trace_entries.h */
struct keyed {
	struct trace_entry	ent;
	u64			func;
	u64			caller;
	u32			epoch;
	u32			seq;
	s32			depth;
	s32			tgid;
};

/* As struct ftrace_graph_ent_entry there */
struct plain {
	struct trace_entry	ent;
	unsigned long		func;
	int			depth;
} __packed;

static bool is(const char *what)
{
	return !strcmp(how, what);
}

static int push(const void *record, size_t size)
{
	const struct xftrace_control *page = (void *)control;
	struct trace_buffer *buffer = (void *)(unsigned long)page->ring.buffer;
	struct ring_buffer_event *event = ring_buffer_lock_reserve(buffer, size);

	if (!event)
		return -ENOSPC;
	memcpy(ring_buffer_event_data(event), record, size);
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 3, 0)
	return ring_buffer_unlock_commit(buffer, event);
#else
	return ring_buffer_unlock_commit(buffer);
#endif
}

static int forge(void)
{
	const struct xftrace_control *page = (void *)control;
	const struct xftrace_keys *keys = (void *)(unsigned long)page->ident.keys;
	u32 *next = this_cpu_ptr((u32 __percpu *)seq);
	struct keyed record = {
		.ent	= { .type = page->ident.call_type, .pid = current->pid },
		.func	= page->host.functions[0],
		.caller	= page->host.functions[0] + 5,
		.epoch	= keys->epoch,
		.seq	= *next,
		.depth	= 1,
		.tgid	= current->tgid,
	};
	struct plain plain = {
		.ent	= { .type = page->ident.plain_call_type, .pid = current->pid },
		.func	= record.func,
		.depth	= 1,
	};
	u64 key;

	if (is("plain"))
		return push(&plain, sizeof(plain));
	if (is("stale"))
		record.epoch -= OLD;
	key = keys->slot[record.epoch % XFTRACE_KEY_SLOTS];
	if (is("unknown"))
		record.epoch += 1 << 20;
	else if (is("replayed"))
		record.seq = 0;
	else if (is("depth"))
		record.depth = 1000;
	else if (is("ahead"))
		record.seq += AHEAD;
	else if (is("good"))
		++*next;
	if (!is("nokey")) {
		record.func ^= key;
		record.caller ^= key;
	}
	return push(&record, is("cut") ? offsetof(struct keyed, depth) : sizeof(record));
}

static int __init xf_forge_init(void)
{
	unsigned long flags;
	int ret;

	if (is("warn")) {
		WARN(1, "xf_forge: asked to warn\n");
		return 0;
	}
	if (!control || !seq)
		return -EINVAL;
	/* No record of this CPU's own comes between */
	local_irq_save(flags);
	ret = forge();
	local_irq_restore(flags);
	return ret;
}

static void __exit xf_forge_exit(void)
{
}

module_init(xf_forge_init);
module_exit(xf_forge_exit);
MODULE_DESCRIPTION("Writes a forged record into Ftrace's ring buffer, for xftrace's tests");
MODULE_LICENSE("GPL");
