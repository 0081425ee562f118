// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A benign hook for the lab's guest: a handler of this module runs whenever
 * iterate_dir() returns.
 */
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/timekeeping.h>

static int returned(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	/* The harmless call that a hook's own work would make. */
	ktime_get_real_seconds();
	return 0;
}

static struct kretprobe probe = {
	.kp.symbol_name = "iterate_dir",
	.handler = returned,
};

static int __init hook_init(void)
{
	return register_kretprobe(&probe);
}

static void __exit hook_exit(void)
{
	unregister_kretprobe(&probe);
}

module_init(hook_init);
module_exit(hook_exit);
MODULE_DESCRIPTION("Lab: a return probe on iterate_dir");
MODULE_LICENSE("GPL");
