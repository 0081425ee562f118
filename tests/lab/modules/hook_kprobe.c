// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A benign hook for the lab's guest: a handler of this module runs whenever
 * iterate_dir() is entered.
 */
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/timekeeping.h>

static int entered(struct kprobe *probe, struct pt_regs *regs)
{
	/* The harmless call that a hook's own work would make. */
	ktime_get_real_seconds();
	return 0;
}

static struct kprobe probe = {
	.symbol_name = "iterate_dir",
	.pre_handler = entered,
};

static int __init hook_init(void)
{
	return register_kprobe(&probe);
}

static void __exit hook_exit(void)
{
	unregister_kprobe(&probe);
}

module_init(hook_init);
module_exit(hook_exit);
MODULE_DESCRIPTION("Lab: a probe on iterate_dir");
MODULE_LICENSE("GPL");
