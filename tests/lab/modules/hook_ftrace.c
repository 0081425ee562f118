// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A benign hook for the lab's guest: getdents64 goes through this module, which
 * passes it on. Ftrace is asked to continue in another function (IPMODIFY), as
 * live patching does, and so do the newer rootkits.
 */
#include <linux/ftrace.h>
#include <linux/module.h>
#include <linux/ptrace.h>
#include <linux/timekeeping.h>
#include <linux/version.h>

static char hooked[] = "__x64_sys_getdents64";
static asmlinkage long (*original)(const struct pt_regs *regs);

static asmlinkage long passed_on(const struct pt_regs *regs)
{
	long result = original(regs);

	/* The harmless call that a hook's own work would make. */
	ktime_get_real_seconds();
	return result;
}

static void notrace divert(unsigned long ip, unsigned long parent_ip,
			   struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	if (within_module(parent_ip, THIS_MODULE))
		return;
	original = (void *)ip;
	instruction_pointer_set(ftrace_get_regs(fregs), (unsigned long)passed_on);
}

static struct ftrace_ops ops = {
	.func = divert,
	.flags = FTRACE_OPS_FL_SAVE_REGS | FTRACE_OPS_FL_IPMODIFY |
		 FTRACE_OPS_FL_RECURSION,
};

static int __init hook_init(void)
{
	int error = ftrace_set_filter(&ops, hooked, sizeof(hooked) - 1, 1);

	return error ?: register_ftrace_function(&ops);
}

static void __exit hook_exit(void)
{
	unregister_ftrace_function(&ops);
}

module_init(hook_init);
module_exit(hook_exit);
MODULE_DESCRIPTION("Lab: pass getdents64 through a module by ftrace");
MODULE_LICENSE("GPL");
