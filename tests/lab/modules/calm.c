// SPDX-License-Identifier: GPL-2.0-only
/*
 * A module that hooks nothing, as most do: a file in /proc, and a kernel thread
 * that wakes up now and then.
 */
#include <linux/delay.h>
#include <linux/err.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>

static struct task_struct *thread;
static unsigned long rounds;

static int calm_show(struct seq_file *file, void *unused)
{
	seq_printf(file, "%lu\n", READ_ONCE(rounds));
	return 0;
}

static int calm_work(void *unused)
{
	while (!kthread_should_stop()) {
		WRITE_ONCE(rounds, rounds + 1);
		msleep_interruptible(20);
	}
	return 0;
}

static int __init calm_init(void)
{
	if (!proc_create_single("calm", 0444, NULL, calm_show))
		return -ENOMEM;
	thread = kthread_run(calm_work, NULL, "calm");
	if (IS_ERR(thread)) {
		remove_proc_entry("calm", NULL);
		return PTR_ERR(thread);
	}
	return 0;
}

static void __exit calm_exit(void)
{
	remove_proc_entry("calm", NULL);
	kthread_stop(thread);
}

module_init(calm_init);
module_exit(calm_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("A clean module for xftrace's tests");
