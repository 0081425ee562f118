// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A benign hook for the lab's guest: a function of this module runs at each
 * event sched_process_exec.
 */
#include <linux/string.h>
#include <linux/tracepoint.h>

#include "hook.h"

static struct tracepoint *found;

static void passed_by(void *data, struct task_struct *task, pid_t old_pid,
		      void *program)
{
	hook_works();
}

static void compare(struct tracepoint *point, void *name)
{
	if (!strcmp(point->name, name))
		found = point;
}

static int __init hook_init(void)
{
	for_each_kernel_tracepoint(compare, "sched_process_exec");
	if (!found)
		return -ENOENT;
	return tracepoint_probe_register(found, passed_by, NULL);
}

static void __exit hook_exit(void)
{
	tracepoint_probe_unregister(found, passed_by, NULL);
	tracepoint_synchronize_unregister();
}

module_init(hook_init);
module_exit(hook_exit);
MODULE_DESCRIPTION("Lab: a function at a tracepoint");
MODULE_LICENSE("GPL");
