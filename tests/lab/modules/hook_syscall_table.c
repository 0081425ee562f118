// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A benign hook for the lab's guest: the entry of getdents64 in the table of
 * system calls leads to this module, which passes the call on. Kernels that no
 * longer dispatch through the table never come here; the entry is bent all the
 * same.
 */
#include <linux/ptrace.h>
#include <linux/syscalls.h>

#include "hook.h"

static long (*original)(const struct pt_regs *regs);
static void **entry;

static long passed_on(const struct pt_regs *regs)
{
	long result = original(regs);

	hook_works();
	return result;
}

static int __init hook_init(void)
{
	void **table = hook_find("sys_call_table");
	void *ours = passed_on;

	if (!table)
		return -ENOENT;
	entry = &table[__NR_getdents64];
	original = *entry;
	return hook_poke(entry, &ours, sizeof(ours));
}

static void __exit hook_exit(void)
{
	hook_poke(entry, &original, sizeof(original));
}

module_init(hook_init);
module_exit(hook_exit);
MODULE_DESCRIPTION("Lab: bend an entry of the table of system calls");
MODULE_LICENSE("GPL");
