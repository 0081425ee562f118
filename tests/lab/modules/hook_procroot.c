// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A benign hook for the lab's guest: listings of /proc go through this module,
 * which passes them on. The file operations of /proc's root directory are
 * replaced by a copy whose iterate_shared is ours, as Adore-ng replaced
 * readdir. With hide=1, now or later, it is not on the kernel's list of modules,
 * and with hide=0 it is again; nobody else is to load modules meanwhile.
 * hook_notrace.c is the same with functions that Ftrace does not see.
 */
#include <linux/fs.h>
#include <linux/module.h>
#include <linux/rculist.h>
#include <linux/timekeeping.h>

#ifndef VISIBILITY
#define VISIBILITY
#endif

static const struct file_operations *original;
static struct file_operations replaced;
static struct inode *root;

static int VISIBILITY passed_on(struct file *file, struct dir_context *context)
{
	int result = original->iterate_shared(file, context);

	/* The harmless call that a hook's own work would make. */
	ktime_get_real_seconds();
	return result;
}

static struct list_head *place;

static int set_hide(const char *value, const struct kernel_param *param)
{
	bool hide;
	int error = kstrtobool(value, &hide);

	if (error || hide == !!place)
		return error;
	if (hide) {
		place = THIS_MODULE->list.prev;
		list_del_rcu(&THIS_MODULE->list);
	} else {
		list_add_rcu(&THIS_MODULE->list, place);
		place = NULL;
	}
	return 0;
}

static const struct kernel_param_ops hide_ops = { .set = set_hide };
module_param_cb(hide, &hide_ops, NULL, 0200);

static int __init hook_init(void)
{
	struct file *proc = filp_open("/proc", O_RDONLY | O_DIRECTORY, 0);

	if (IS_ERR(proc))
		return PTR_ERR(proc);
	root = igrab(file_inode(proc));
	filp_close(proc, NULL);
	if (!root)
		return -ENOENT;
	original = root->i_fop;
	replaced = *original;
	replaced.iterate_shared = passed_on;
	WRITE_ONCE(root->i_fop, &replaced);
	return 0;
}

static void __exit hook_exit(void)
{
	WRITE_ONCE(root->i_fop, original);
	iput(root);
}

module_init(hook_init);
module_exit(hook_exit);
MODULE_DESCRIPTION("Lab: pass listings of /proc through a module");
MODULE_LICENSE("GPL");
